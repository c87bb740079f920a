# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`expert_mlp` on the GPU."""

import numpy as np
from absl.testing import absltest

from tests.gpu import device
from tests.kernels import expert_mlp_test


def setUpModule():
  device.require_hopper()


class ExpertMLPDeviceTest(expert_mlp_test.ExpertMLPTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = "bfloat16"
  WIDTHS = (384, 256)
  # Both sides of the few rows' kernel, and all its paddings.
  ROWS = (1, 2, 7, 8, 9, 16, 33, 63, 64, 65, 300)

  def test_bit_equal_over_20_runs(self):
    for num_rows in (1, 64, 300):
      args = self.inputs(num_rows, num_experts=16, choices=4)
      first = self.run_op(*args)
      for _ in range(20):
        np.testing.assert_array_equal(self.run_op(*args), first)


if __name__ == "__main__":
  absltest.main()
