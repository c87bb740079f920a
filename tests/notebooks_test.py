# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import re

import jupytext
from absl.testing import absltest, parameterized

_FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
_SOURCES = sorted(path.stem for path in _FOLDER.glob("*.py"))


class NotebooksTest(parameterized.TestCase):
  @parameterized.parameters(*_SOURCES)
  def test_cells_are_short_and_import_public_names(self, name):
    for cell in jupytext.read(_FOLDER / f"{name}.py").cells:
      if cell.cell_type != "code":
        continue
      lines = [line for line in cell.source.splitlines() if line.strip()]
      self.assertLessEqual(len(lines), 15, cell.source)
      self.assertNotRegex(cell.source, r"\b(ic|pallas_kernels|\w+)\._[a-z]")

  @parameterized.parameters(*_SOURCES)
  def test_what_colab_opens_is_the_source_with_outputs(self, name):
    committed = json.loads((_FOLDER / f"{name}.ipynb").read_text())
    source = jupytext.read(_FOLDER / f"{name}.py")
    self.assertEqual(
      ["".join(cell["source"]) for cell in committed["cells"]],
      [cell.source for cell in source.cells],
      "Run `make notebooks`.",
    )
    ran = [c for c in committed["cells"] if c["cell_type"] == "code"]
    self.assertTrue(all(c["execution_count"] for c in ran))
    text = "".join(
      "".join(output.get("text", "")) for c in ran for output in c["outputs"]
    )
    # The first output names the device that made them.
    self.assertRegex(text, re.compile(r"^\d+\.\d+\.\S+ \S+", re.MULTILINE))


if __name__ == "__main__":
  absltest.main()
