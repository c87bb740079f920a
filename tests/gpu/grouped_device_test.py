# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`grouped_matmul` on the GPU: the op's contract, and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import pallas_kernels
from tests import tolerances
from tests.gpu import device, float64, generated
from tests.kernels import gradient_loops, grouped_test

_GROUPS = 16
_REPEATS = 20


def setUpModule():
  device.require_hopper()


class GroupedMatmulDeviceTest(grouped_test.GroupedMatmulTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = "bfloat16"
  WIDTHS = (128, 256)


@functools.partial(jax.jit, static_argnames=("implementation",))
def products_and_gradients(rows, matrices, sizes, grad, implementation):
  out, vjp = jax.vjp(
    lambda rows, matrices: pallas_kernels.grouped_matmul(
      rows, matrices, sizes, implementation=implementation
    ),
    rows,
    matrices,
  )
  return out, vjp(grad)


def arguments(rng, num_rows, widths, most_groups):
  """Rows, matrices, sizes of groups, and a gradient of the products."""
  groups = rng.integers(0, most_groups, num_rows)
  return (
    generated.normal(rng, num_rows, widths[0]),
    generated.normal(rng, _GROUPS, *widths),
    jnp.asarray(np.bincount(groups, minlength=_GROUPS), jnp.int32),
    generated.normal(rng, num_rows, widths[1]),
  )


class RandomGroupsTest(parameterized.TestCase):
  IMPLEMENTATION = "mosaic_gpu"

  @parameterized.product(
    num_rows=(1, 4, 63, 64, 65, 300), widths=((256, 768), (768, 128))
  )
  def test_rows(self, num_rows, widths):
    rng = np.random.default_rng(num_rows)
    run = generated.jitted("grouped_matmul", self.IMPLEMENTATION)
    # Values grow with the square root of the width.
    tolerance = tolerances.tolerance("bfloat16", widths[0])
    # All in few groups, and spread out.
    for most_groups in (1, 3, _GROUPS, _GROUPS):
      args = arguments(rng, num_rows, widths, most_groups)
      actual = run(*args[:3])
      expected, _ = float64.grouped_matmul(*args)
      np.testing.assert_allclose(
        np.asarray(actual, np.float32), expected, **tolerance
      )
      device.count_cases(num_rows)
    for _ in range(_REPEATS):
      np.testing.assert_array_equal(run(*args[:3]), actual)

  @parameterized.parameters(4, 130)
  def test_gradients(self, num_rows):
    rng = np.random.default_rng(num_rows)
    for most_groups in (2, _GROUPS):
      args = arguments(rng, num_rows, (256, 384), most_groups)
      actual = products_and_gradients(*args, implementation=self.IMPLEMENTATION)
      leaves = map(jax.tree.leaves, (actual, float64.grouped_matmul(*args)))
      for a, b in zip(*leaves, strict=True):
        self.assertLess(gradient_loops.relative_error(a, b), 1e-2)
      device.count_cases(num_rows)


if __name__ == "__main__":
  device.main()
