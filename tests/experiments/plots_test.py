# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
from absl.testing import absltest

from experiments import plots
from tests.experiments import scripts_test

_PNG = b"\x89PNG"


class PlotsTest(scripts_test.ScriptCase):
  def test_writes_whole_pictures(self):
    for num_layers in (2, 61):  # With numbers in the cells and without.
      path = self.folder / "new" / f"{num_layers}.png"
      plots.heatmap(path, np.eye(num_layers), title="t", colour_label="c")
      self.assertTrue(path.read_bytes().startswith(_PNG))
    rows = [
      {"method": method, "share": share, "loss": 1 - share}
      for method in ("greedy", "uniform")
      for share in (0.5, 0.25)
    ]
    plots.losses_by_retention(self.folder / "loss.png", rows, 0.7)
    plots.curves_by_retention(
      self.folder / "curves.png",
      {"uniform": [(1.0, [0.5]), (0.25, [0.3, 0.5])]},
      label="accuracy",
    )
    plots.bars(
      self.folder / "bars.png",
      {"full": [0.4, 0.6], "uniform 1/2": [0.4]},
      label="accuracy",
    )
    for name in ("loss", "curves", "bars"):
      path = self.folder / f"{name}.png"
      self.assertTrue(path.read_bytes().startswith(_PNG), name)
    self.assertEmpty(list(self.folder.rglob("*.tmp")))


if __name__ == "__main__":
  absltest.main()
