# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Nobody names an implementation, and the GPU's kernel runs."""

import jax
import numpy as np
from absl.testing import parameterized

from tests.gpu import device
from tests.kernels import chip_test, pretended


def setUpModule():
  device.require_hopper()


class DispatchDeviceTest(parameterized.TestCase):
  @parameterized.parameters(*chip_test.OPS)
  def test_none_is_the_kernel(self, op):
    run, args = chip_test.call(op)
    with pretended.choices() as choices:
      actual = run(*args)
    self.assertEqual(choices, {op: ("mosaic_gpu", "")})
    kernel, _ = chip_test.call(op, "mosaic_gpu")
    expected = kernel(*args)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


if __name__ == "__main__":
  device.main()
