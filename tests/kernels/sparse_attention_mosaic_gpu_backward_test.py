# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What surrounds the GPU's gradient kernel, which here is emulated."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.hopper import chip, row_sums
from pallas_kernels.sparse_attention import mosaic_gpu_backward, reference
from pallas_kernels.sparse_attention import mosaic_gpu_backward_kernel as kernel
from tests import tolerances
from tests.kernels import gradient_loops, row_sums_emulator

_SCALE = 0.1


def call(
  problem,
  bounds,
  query,
  grad_out,
  table,
  indices,
  log_sum_exp,
  delta,
  grad_query,
  bits,
):
  """`kernel.call` in float32, of whole chunks."""
  sizes = problem.sizes
  items, exists = row_sums_emulator.chunk_items(sizes, bounds)
  place = jnp.minimum(items, query.shape[0] - 1)
  q, do = (x[place].astype(jnp.float32) for x in (query, grad_out))
  chosen = indices[place // problem.head_tiles]
  rows = jnp.where(
    chosen[..., None] >= 0, table[bounds[2] + jnp.maximum(chosen, 0)], 0
  ).astype(jnp.float32)
  # log_sum_exp and delta have `TILE` heads.
  heads = slice(0, problem.heads)
  logits = problem.scale * jnp.einsum("inc,ikc->ink", q, rows) / np.log(2)
  probs = jnp.exp2(jnp.minimum(logits - log_sum_exp[place, heads, None], 0.0))
  values = rows[..., : problem.value_dim]
  ds = jnp.einsum("inv,ikv->ink", do, values) - delta[place, heads, None]
  ds = ds * probs * problem.scale
  dq = jnp.einsum("ink,ikc->inc", ds, rows).astype(query.dtype)
  target = jnp.where(exists, items, query.shape[0])
  grad_query[...] = grad_query[...].at[target].set(dq, mode="drop")
  dk = jnp.einsum("ink,inc->ikc", ds, q)
  dk = dk.at[..., : problem.value_dim].add(
    jnp.einsum("ink,inv->ikv", probs, do)
  )
  places = row_sums_emulator.record(sizes, chosen, exists, bits)
  return dk.reshape(-1, sizes.width).astype(jnp.bfloat16), places


def inputs(batch, queries, heads, keys, width, value_dim, count, seed=0):
  """Kernel-ready arrays; query 1 has no row, and others have holes."""
  rng = np.random.default_rng(seed)

  def normal(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.normal(size=shape), dtype)

  indices = rng.random((batch, queries, max(keys, count))).argsort(-1)
  indices = indices[..., :count].astype(np.int32)
  is_hole = (rng.random(indices.shape) < 0.2) | (indices >= keys)
  indices[is_hole] = -1
  indices[:, 1:2] = -1
  return (
    normal(batch, queries, heads, width),
    normal(batch, keys, width),
    jnp.asarray(indices),
    normal(batch, queries, heads, value_dim),
    normal(batch, queries, heads, dtype=jnp.float32),
  )


def gradients(query, latent, indices, grad_out, grad_lse, grad_probs=None):
  """Of the emulated kernel, after the reference's forward."""
  value_dim = grad_out.shape[-1]
  out, residuals = reference.sparse_mla(
    query, latent, indices, scale=_SCALE, value_dim=value_dim
  )
  return mosaic_gpu_backward.sparse_mla_backward(
    query,
    latent,
    indices,
    out,
    residuals.log_sum_exp,
    grad_out,
    grad_lse,
    grad_probs,
    scale=_SCALE,
    value_dim=value_dim,
  )


class BackwardTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    for target, name, value in (
      (chip, "chip", lambda: row_sums_emulator.CHIP),
      (kernel, "call", call),
      (row_sums, "add_chunk", row_sums_emulator.add_chunk),
    ):
      self.enter_context(mock.patch.object(target, name, value))

  def assert_right(self, args, grads):
    query, latent, indices, grad_out, grad_lse = args
    if grad_lse is None:
      grad_lse = np.zeros(query.shape[:3])
    expected = gradient_loops.sparse_mla(
      query, latent, indices, grad_out, grad_lse, _SCALE
    )
    limit = tolerances.tolerance("bfloat16")["rtol"]
    for actual, want in zip(grads, expected, strict=True):
      self.assertEqual(actual.dtype, jnp.bfloat16)
      self.assertLess(gradient_loops.relative_error(actual, want), limit)

  @parameterized.parameters(
    (1, 9, 8, 40, 128, 128, 64),
    (2, 7, 24, 40, 192, 128, 64),
    (2, 5, 80, 70, 128, 128, 64),
    # Heads of no multiple of 8, in one tile and in two.
    (1, 9, 5, 40, 128, 128, 64),
    (1, 5, 73, 70, 128, 128, 64),
    (1, 3, 128, 200, 128, 128, 128),
  )
  def test_equals_float64_loops_in_any_chunks(self, *shape):
    args = inputs(*shape)
    whole = jax.jit(gradients)(*args)
    self.assert_right(args, whole)
    keys, width, rows = shape[3], shape[4], shape[-1]
    one_item = row_sums.Sizes(1, 1, keys, rows, width, 1).item_bytes
    for items in (1, 3, 4):
      with mock.patch.object(row_sums, "CHUNK_BYTES", items * one_item):
        chunked = jax.jit(lambda *args: gradients(*args))(*args)
      self.assert_right(args, chunked)
      np.testing.assert_array_equal(chunked[0], whole[0])

  def test_without_a_gradient_of_the_log_sum_exp(self):
    args = (*inputs(1, 9, 8, 40, 128, 128, 64)[:4], None)
    self.assert_right(args, gradients(*args))

  def test_a_query_without_rows_ignores_the_gradient_of_its_minus_infinity(
    self,
  ):
    *args, grad_lse = inputs(1, 9, 8, 40, 128, 128, 64)
    poisoned = grad_lse.at[:, 1].set(jnp.nan)
    jax.tree.map(
      np.testing.assert_array_equal,
      gradients(*args, poisoned),
      gradients(*args, grad_lse),
    )

  def test_a_gradient_of_the_mean_probabilities_is_the_references(self):
    query, latent, indices, grad_out, grad_lse = inputs(
      1, 9, 8, 40, 128, 128, 64
    )
    grad_probs = jnp.ones(indices.shape, jnp.float32)
    _, vjp = jax.vjp(
      lambda query, latent: reference.sparse_mla(
        query, latent, indices, scale=_SCALE, value_dim=128
      ),
      query,
      latent,
    )
    residuals = reference.SparseMLAResiduals(grad_lse, grad_probs)
    jax.tree.map(
      np.testing.assert_array_equal,
      gradients(query, latent, indices, grad_out, grad_lse, grad_probs),
      vjp((grad_out, residuals)),
    )


class SizesTest(parameterized.TestCase):
  @parameterized.parameters(128, 192, 256, 320, 512, 576)
  def test_warpgroups_share_the_columns(self, width):
    sizes = row_sums.Sizes(1, 1, 1, 64, width, 1)
    problem = kernel.Problem(sizes, 1, 64, 128, 1.0)
    ranges = problem.dq_tiles
    self.assertEqual(ranges[0][0], 0)
    self.assertEqual(ranges[-1][1], width // kernel.TILE)
    for before, after in itertools.pairwise(ranges):
      self.assertEqual(before[1], after[0])
    self.assertLessEqual(max(last - first for first, last in ranges), 4)
    self.assertEqual(problem.k_readers, 3 if width == 576 else 2)
    self.assertEqual(problem.parts[-1][1], width // kernel.TILE)

  @parameterized.parameters(1, 5, 264, 4096)
  def test_chunks_cover_every_item_once(self, items):
    sizes = row_sums.Sizes(3, items, 8192, 2048, 576, 132)
    bounds = row_sums.chunk_bounds(sizes)
    covered = [i for first, last, _ in bounds for i in range(first, last)]
    self.assertEqual(covered, list(range(3 * items)))
    for first, last, row in bounds:
      self.assertEqual(row, first // items * 8192)
      self.assertEqual((last - 1) // items, first // items)
      self.assertLessEqual(last - first, sizes.max_items)

  def test_chunks_are_whole_waves_below_the_bound(self):
    sizes = row_sums.Sizes(1, 4096, 32768, 2048, 576, 132)
    self.assertEqual(sizes.max_items, 264)
    held = sum(x.size * x.dtype.itemsize for x in sizes.out_type)
    self.assertLessEqual(held, row_sums.CHUNK_BYTES)
    self.assertEqual(sizes._replace(num_keys=1 << 17).max_items, 264)
    self.assertEqual(sizes._replace(num_keys=1 << 30).max_items, 1)

  @parameterized.parameters((1 << 16, "uint16"), ((1 << 16) + 1, "int32"))
  def test_places_hold_the_number_of_any_row(self, rows, dtype):
    sizes = row_sums.Sizes(1, 1, 1, rows, 64, 1)
    self.assertEqual(sizes.out_type[1].dtype, dtype)


if __name__ == "__main__":
  absltest.main()
