# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The device's float64 definitions against loops, on any platform."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from tests import tolerances
from tests.gpu import float64
from tests.kernels import (
  dense_attention_test,
  gradient_loops,
  indexer_test,
  loops,
  selected_scores_mosaic_gpu_test,
  sparse_attention_mosaic_gpu_backward_test,
)


class Float64Test(absltest.TestCase):
  def assert_equal(self, actual, expected):
    leaves = map(jax.tree.leaves, (actual, expected))
    for a, b in zip(*leaves, strict=True):
      self.assertEqual(a.dtype, np.float64)
      np.testing.assert_allclose(a, b, **tolerances.tolerance("float64"))

  def test_indexer_scores(self):
    q, k, w, start, end = indexer_test.inputs(
      (2, 9, 20, 4, 8), jnp.bfloat16, offset=3
    )
    start = start.at[:, 4:6].set(7).at[:, 6].set(30)
    scale = jnp.asarray(np.random.default_rng(0).random((2, 20)), jnp.float32)
    scores, sizes = float64.indexer_scores(q, k, w, start, end, scale)
    expected = loops.indexer_scores(q, k, w, start, end)
    self.assert_equal(scores, expected * np.asarray(scale, np.float64)[:, None])
    is_visible = np.isfinite(expected)
    self.assertTrue(np.all(sizes[is_visible] >= np.abs(scores[is_visible])))

  def test_selected_scores(self):
    *args, grad = selected_scores_mosaic_gpu_test.inputs(2, 7, 4, 8, 20, 9)
    self.assert_equal(
      float64.selected_scores(*args, grad),
      gradient_loops.selected_scores(*args, grad),
    )

  def test_sparse_mla(self):
    args = sparse_attention_mosaic_gpu_backward_test.inputs(
      2, 7, 3, 20, 12, 8, 9
    )
    self.assert_equal(
      float64.sparse_mla(*args[:3], scale=0.3, value_dim=8),
      loops.sparse_mla(*args[:3], 0.3, 8),
    )
    self.assert_equal(
      float64.sparse_mla_gradients(*args, scale=0.3),
      gradient_loops.sparse_mla(*args, 0.3),
    )

  def test_dense_mla_residuals(self):
    query, latent, start, end = dense_attention_test.inputs((2, 9, 20, 3, 8))
    start = start.at[:, 4:].set(7).at[:, 5].set(30)
    args = (query, latent, start, end)
    self.assert_equal(
      float64.dense_mla_residuals(*args, scale=0.3),
      dense_attention_test.loop(*args, 0.3),
    )

  def test_grouped_matmul(self):
    rng = np.random.default_rng(0)
    sizes = (3, 0, 5, 1)
    rows, matrices, grad = (
      rng.normal(size=shape) for shape in ((9, 4), (4, 4, 6), (9, 6))
    )
    groups = np.repeat(np.arange(4), sizes)
    expected = np.einsum("me,mef->mf", rows, matrices[groups])
    grad_matrices = np.zeros_like(matrices)
    for row, group in enumerate(groups):
      grad_matrices[group] += np.outer(rows[row], grad[row])
    self.assert_equal(
      float64.grouped_matmul(rows, matrices, np.array(sizes), grad),
      (
        expected,
        (np.einsum("mf,mef->me", grad, matrices[groups]), grad_matrices),
      ),
    )


if __name__ == "__main__":
  absltest.main()
