# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from tests import tolerances
from tests.kernels import errors


class GroupedMatmulTest(parameterized.TestCase):
  IMPLEMENTATION = "xla"
  DTYPE = "float32"
  WIDTHS = (24, 40)

  def inputs(self, sizes, seed=0):
    rng = np.random.default_rng(seed)
    width, out_width = self.WIDTHS
    return (
      jnp.asarray(rng.normal(size=(sum(sizes), width)), self.DTYPE),
      jnp.asarray(rng.normal(size=(len(sizes), width, out_width)), self.DTYPE),
      jnp.asarray(sizes, jnp.int32),
    )

  def multiply(self, *args):
    return pallas_kernels.grouped_matmul(
      *args, implementation=self.IMPLEMENTATION
    )

  @parameterized.parameters(
    ((5, 0, 7, 1),), ((0, 0, 0, 200),), ((1,) * 16,), ((64, 130, 3, 0, 59),)
  )
  def test_equals_a_float64_loop(self, sizes):
    rows, matrices, group_sizes = self.inputs(sizes)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.stack(
      [
        np.asarray(row, np.float64) @ np.asarray(matrices[g], np.float64)
        for row, g in zip(rows, groups, strict=True)
      ]
    )
    actual = jax.jit(self.multiply)(rows, matrices, group_sizes)
    self.assertEqual(actual.dtype, jnp.dtype(self.DTYPE))
    # Values grow with the square root of the width; so does the tolerance.
    np.testing.assert_allclose(
      np.asarray(actual, np.float64),
      expected,
      **tolerances.tolerance(self.DTYPE, self.WIDTHS[0]),
    )

  def test_gradients_are_those_of_a_product_a_group(self):
    sizes = (6, 0, 9, 2)
    args = self.inputs(sizes)
    bounds = np.concatenate([[0], np.cumsum(sizes)])

    def loop(rows, matrices):
      return jnp.concatenate(
        [
          jnp.matmul(
            rows[bounds[g] : bounds[g + 1]], matrices[g], precision="highest"
          )
          for g in range(len(sizes))
        ]
      )

    def grads(form):
      def loss(rows, matrices):
        return jnp.sum(form(rows, matrices).astype(jnp.float32) ** 2)

      return jax.jit(jax.grad(loss, (0, 1)))(*args[:2])

    expected = grads(loop)
    actual = grads(
      lambda rows, matrices: self.multiply(rows, matrices, args[2])
    )
    for a, b in zip(actual, expected, strict=True):
      scale = float(jnp.max(jnp.abs(b)))
      np.testing.assert_allclose(
        np.asarray(a, np.float32) / scale,
        np.asarray(b, np.float32) / scale,
        **tolerances.tolerance(self.DTYPE, 4, grads=True),
      )

  def test_errors(self):
    rows, matrices, group_sizes = self.inputs((3, 4))
    with errors.unchecked():
      with self.assertRaisesRegex(ValueError, "width and dtype of `rows`"):
        self.multiply(rows[:, 1:], matrices, group_sizes)
      with self.assertRaisesRegex(ValueError, "one entry a matrix"):
        self.multiply(rows, matrices, group_sizes[:1])


class MosaicGpuUnfitTest(absltest.TestCase):
  def test_says_what_it_needs(self):
    for dtype, width, message in (
      ("float32", 128, "16-bit dtype.*got float32"),
      ("bfloat16", 96, "multiples of 128: got 96 x 128"),
    ):
      rows = jnp.zeros((8, width), dtype)
      matrices = jnp.zeros((2, width, 128), dtype)
      with self.assertRaisesRegex(NotImplementedError, message):
        pallas_kernels.grouped_matmul(
          rows, matrices, jnp.array([4, 4]), implementation="mosaic_gpu"
        )


if __name__ == "__main__":
  absltest.main()
