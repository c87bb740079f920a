# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of `sparse_mla` on the GPU, against float64 loops."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.hopper import row_sums
from pallas_kernels.sparse_attention import reference
from tests import tolerances
from tests.gpu import device
from tests.kernels import gradient_loops
from tests.kernels import sparse_attention_mosaic_gpu_backward_test as shared

_REPEATS = 20
_SCALE = 0.06


def setUpModule():
  device.require_hopper()


@functools.partial(jax.jit, static_argnames=("implementation",))
def gradients(
  query,
  latent,
  indices,
  grad_out,
  grad_lse,
  grad_probs=None,
  implementation="mosaic_gpu",
):
  """Of query and latent, of the op as it is called."""
  value_dim = grad_out.shape[-1]

  def attend(query, latent):
    out, residuals = pallas_kernels.sparse_mla(
      query,
      latent,
      indices,
      scale=_SCALE,
      value_dim=value_dim,
      return_residuals=True,
      implementation=implementation,
    )
    # What is left out has a gradient that JAX knows to be zero.
    if grad_probs is None:
      return out, residuals.log_sum_exp
    return out, residuals

  _, vjp = jax.vjp(attend, query, latent)
  if grad_probs is None:
    return vjp((grad_out, grad_lse))
  return vjp((grad_out, reference.SparseMLAResiduals(grad_lse, grad_probs)))


class SparseMLABackwardDeviceTest(parameterized.TestCase):
  def assert_right(self, args, grads):
    expected = gradient_loops.sparse_mla(*args, _SCALE)
    limit = tolerances.tolerance("bfloat16")["rtol"]
    for actual, want in zip(grads, expected, strict=True):
      self.assertEqual(actual.dtype, jnp.bfloat16)
      self.assertLess(gradient_loops.relative_error(actual, want), limit)

  def assert_equal(self, grads, others):
    """Compares on the GPU: the host takes seconds for so many bfloat16."""
    equal = jax.tree.map(jnp.array_equal, grads, others)
    self.assertTrue(all(jax.tree.leaves(equal)), equal)

  @parameterized.parameters(
    # batch, queries, heads, keys, width, value_dim, rows of a query.
    (1, 300, 64, 1024, 576, 512, 192),
    (1, 140, 128, 700, 576, 512, 128),
    (2, 70, 20, 500, 576, 512, 200),
    (1, 3, 80, 400, 128, 128, 64),
    (2, 9, 2, 40, 24, 16, 8),
    (1, 1, 64, 4096, 576, 512, 2048),
    (1, 5, 16, 300, 256, 128, 128),
  )
  def test_equals_float64_loops(self, *shape):
    args = shared.inputs(*shape, seed=sum(shape))
    self.assert_right(args, gradients(*args))

  def test_bit_equal_from_run_to_run_and_in_chunks(self):
    args = shared.inputs(2, 200, 64, 900, 576, 512, 128)
    first = gradients(*args)
    for _ in range(_REPEATS):
      self.assert_equal(gradients(*args), first)
    one_item = row_sums.Sizes(1, 1, 900, 128, 576, 1).item_bytes
    jax.clear_caches()
    with mock.patch.object(row_sums, "CHUNK_BYTES", 67 * one_item):
      chunked = gradients(*args)
    jax.clear_caches()
    # Chunks follow each other in the order of the queries, as their sums do.
    self.assert_equal(chunked, first)

  def test_nan_in_unselected_rows_touches_nothing(self):
    query, latent, indices, *grads = shared.inputs(
      1, 140, 64, 700, 576, 512, 128
    )
    indices = jnp.where(indices < 10, -1, indices)
    poisoned = latent.at[:, :10].set(jnp.nan)
    actual = gradients(query, poisoned, indices, *grads)
    self.assert_equal(actual, gradients(query, latent, indices, *grads))
    self.assertFalse(actual[1][:, :10].any())

  def test_queries_without_rows_have_no_gradient(self):
    query, latent, indices, *grads = shared.inputs(
      1, 140, 64, 700, 576, 512, 128
    )
    none = jnp.full_like(indices, -1)
    for grad in gradients(query, latent, none, *grads):
      self.assert_equal(grad, jnp.zeros_like(grad))

  def test_a_gradient_of_the_mean_probabilities_is_the_references(self):
    args = shared.inputs(1, 9, 16, 300, 256, 128, 128)
    grad_probs = jnp.ones(args[2].shape, jnp.float32)
    actual = gradients(*args, grad_probs)
    expected = gradients(*args, grad_probs, implementation="xla")
    limit = tolerances.tolerance("bfloat16")["rtol"]
    for a, b in zip(actual, expected, strict=True):
      self.assertLess(gradient_loops.relative_error(a, b), limit)


if __name__ == "__main__":
  absltest.main()
