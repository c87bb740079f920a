# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`grouped_matmul` on the GPU."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from tests import tolerances
from tests.gpu import device
from tests.kernels import grouped_test


def setUpModule():
  device.require_hopper()


class GroupedMatmulDeviceTest(grouped_test.GroupedMatmulTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = "bfloat16"
  WIDTHS = (128, 256)


class RandomGroupsTest(parameterized.TestCase):
  @parameterized.product(
    num_rows=(1, 4, 63, 64, 65, 300), widths=((256, 1536), (1536, 128))
  )
  def test_equals_xla_in_float32(self, num_rows, widths):
    rng = np.random.default_rng(num_rows)
    run = jax.jit(
      pallas_kernels.grouped_matmul, static_argnames="implementation"
    )
    for seed in range(10):
      groups = rng.integers(0, 16, num_rows)
      sizes = jnp.asarray(np.bincount(groups, minlength=16), jnp.int32)
      rows, matrices = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for shape in ((num_rows, widths[0]), (16, *widths))
      )
      actual = run(rows, matrices, sizes, implementation="mosaic_gpu")
      expected = run(
        rows.astype(jnp.float32),
        matrices.astype(jnp.float32),
        sizes,
        implementation="xla",
      )
      np.testing.assert_allclose(
        np.asarray(actual, np.float32),
        expected,
        # Values grow with the square root of the width.
        **tolerances.tolerance("bfloat16", widths[0]),
      )
      for _ in range(2):
        again = run(rows, matrices, sizes, implementation="mosaic_gpu")
        np.testing.assert_array_equal(again, actual)


if __name__ == "__main__":
  absltest.main()
