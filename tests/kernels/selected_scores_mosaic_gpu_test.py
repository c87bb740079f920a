# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What surrounds the GPU kernels of selected scores, here emulated."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.hopper import chip, row_sums
from pallas_kernels.indexer import mosaic_gpu_selected_kernel as kernel
from tests import tolerances
from tests.kernels import gradient_loops, row_sums_emulator


def products(problem, items, index_q, index_k, indices):
  """Queries, keys and their products, of some items, in float32."""
  q, chosen = index_q[items].astype(jnp.float32), indices[items]
  first_row = items // problem.sizes.items * problem.sizes.num_keys
  keys = index_k[first_row[:, None] + jnp.maximum(chosen, 0)]
  keys = jnp.where(chosen[..., None] >= 0, keys, 0).astype(jnp.float32)
  return q, keys, jnp.einsum("ihd,ikd->ihk", q, keys)


def scores(problem, index_q, index_k, index_weights, indices):
  items = jnp.arange(problem.num_queries)
  _, _, z = products(problem, items, index_q, index_k, indices)
  weights = index_weights[:, : problem.heads]
  return jnp.einsum("ih,ihk->ik", weights, jnp.maximum(z, 0))


def gradients(
  problem,
  bounds,
  index_q,
  index_k,
  index_weights,
  indices,
  grad_scores,
  grad_q,
  grad_weights,
  bits,
):
  """`kernel.gradients` in float32, of whole chunks."""
  sizes = problem.sizes
  items, exists = row_sums_emulator.chunk_items(sizes, bounds)
  place = jnp.minimum(items, problem.num_queries - 1)
  q, keys, z = products(problem, place, index_q, index_k, indices)
  slope = jnp.where(z > 0, grad_scores[place][:, None], 0.0)
  target = jnp.where(exists, items, problem.num_queries)
  dw = jnp.pad(
    jnp.sum(slope * z, axis=2), ((0, 0), (0, kernel.TILE - problem.heads))
  )
  grad_weights[...] = grad_weights[...].at[target].set(dw, mode="drop")
  dz = slope * index_weights[place, : problem.heads, None]
  dq = jnp.einsum("ihk,ikd->ihd", dz, keys).astype(index_q.dtype)
  grad_q[...] = grad_q[...].at[target].set(dq, mode="drop")
  dk = jnp.einsum("ihk,ihd->ikd", dz, q).astype(jnp.bfloat16)
  places = row_sums_emulator.record(sizes, indices[place], exists, bits)
  return dk.reshape(-1, sizes.width), places


def inputs(batch, queries, heads, dim, keys, count, seed=0):
  """Random arrays; query 1 has no key, and others have holes."""
  rng = np.random.default_rng(seed)
  indices = rng.random((batch, queries, max(keys, count))).argsort(-1)
  indices = indices[..., :count].astype(np.int32)
  indices[(rng.random(indices.shape) < 0.2) | (indices >= keys)] = -1
  indices[:, 1:2] = -1
  return (
    jnp.asarray(rng.normal(size=(batch, queries, heads, dim)), jnp.bfloat16),
    jnp.asarray(rng.normal(size=(batch, keys, dim)), jnp.bfloat16),
    jnp.asarray(rng.normal(size=(batch, queries, heads)), jnp.float32),
    jnp.asarray(indices),
    jnp.asarray(rng.normal(size=(batch, queries, count)), jnp.float32),
  )


@jax.jit
def scores_and_gradients(index_q, index_k, weights, indices, grad):
  """Of the op on a GPU."""
  out, vjp = jax.vjp(
    lambda *args: pallas_kernels.selected_indexer_scores(
      *args, indices, implementation="mosaic_gpu"
    ),
    index_q,
    index_k,
    weights,
  )
  return out, vjp(grad)


class SelectedScoresTest(parameterized.TestCase):
  """Also run on a GPU, unpatched."""

  def setUp(self):
    super().setUp()
    for target, name, value in self.patches():
      self.enter_context(mock.patch.object(target, name, value))
      # `scores_and_gradients` calls what is patched when it is traced.
      self.addCleanup(jax.clear_caches)

  def patches(self):
    return (
      (chip, "chip", lambda: row_sums_emulator.CHIP),
      (kernel, "scores", scores),
      (kernel, "gradients", gradients),
      (row_sums, "add_chunk", row_sums_emulator.add_chunk),
    )

  def assert_right(self, args, actual):
    out, grads = actual
    expected, wanted = gradient_loops.selected_scores(*args)
    heads, dim = args[0].shape[2:]
    self.assertEqual(out.dtype, jnp.float32)
    np.testing.assert_allclose(
      out, expected, **tolerances.tolerance("float32", dim * heads)
    )
    kinds = ((jnp.bfloat16, 1), (jnp.bfloat16, 1), (jnp.float32, dim))
    for (dtype, terms), grad, want in zip(kinds, grads, wanted, strict=True):
      self.assertEqual(grad.dtype, dtype)
      limit = tolerances.tolerance(dtype, terms)["rtol"]
      self.assertLess(gradient_loops.relative_error(grad, want), limit)

  @parameterized.parameters(
    (1, 9, 16, 64, 40, 8),
    (2, 7, 12, 64, 40, 70),
    (2, 5, 32, 128, 70, 64),
    (1, 1, 1, 128, 1, 1),
    (1, 6, 64, 128, 300, 200),
  )
  def test_equals_float64_loops(self, *shape):
    args = inputs(*shape)
    self.assert_right(args, scores_and_gradients(*args))

  def test_chunks_change_rounding_only(self):
    args = inputs(2, 7, 12, 64, 40, 70)
    whole = scores_and_gradients(*args)
    one_item = row_sums.Sizes(1, 1, 40, 128, 64, 1).item_bytes
    jax.clear_caches()
    self.addCleanup(jax.clear_caches)
    with mock.patch.object(row_sums, "CHUNK_BYTES", 3 * one_item):
      chunked = scores_and_gradients(*args)
    self.assert_right(args, chunked)
    np.testing.assert_array_equal(chunked[1][0], whole[1][0])

  def test_nan_in_unselected_keys_touches_nothing(self):
    index_q, index_k, weights, indices, grad = inputs(1, 9, 16, 64, 40, 8)
    indices = jnp.where(indices < 10, -1, indices)
    poisoned = index_k.at[:, :10].set(jnp.nan)
    jax.tree.map(
      np.testing.assert_array_equal,
      scores_and_gradients(index_q, poisoned, weights, indices, grad),
      scores_and_gradients(index_q, index_k, weights, indices, grad),
    )

  def test_the_gradient_at_no_index_counts_for_nothing(self):
    *args, grad = inputs(1, 9, 16, 64, 40, 8)
    poisoned = jnp.where(args[-1] < 0, jnp.nan, grad)
    jax.tree.map(
      np.testing.assert_array_equal,
      scores_and_gradients(*args, poisoned),
      scores_and_gradients(*args, grad),
    )

  @parameterized.parameters(
    (0, (1, 9, 65, 64, 40, 8), jnp.bfloat16, "64 heads: got 65"),
    (0, (1, 9, 16, 96, 40, 8), jnp.bfloat16, "64 or 128: got 96"),
    (0, (1, 9, 16, 192, 40, 8), jnp.bfloat16, "64 or 128: got 192"),
    (0, (1, 9, 16, 64, 40, 8), jnp.float32, "float32 and bfloat16"),
    (1, (1, 9, 16, 64, 40, 8), jnp.float32, "bfloat16 and float32"),
  )
  def test_what_it_refuses(self, which, shape, dtype, message):
    args = list(inputs(*shape))
    args[which] = args[which].astype(dtype)
    with self.assertRaisesRegex(NotImplementedError, message):
      scores_and_gradients(*args)


if __name__ == "__main__":
  absltest.main()
