# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse MLA on a TPU's TensorCore: one row copy for each selected row.

`mosaic_tpu_layout` is the form of the cache that can be read a row at a time,
`mosaic_tpu_kernel` the kernel; here are its two entries, its limits and its
sizes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int32

from pallas_kernels import tpu
from pallas_kernels.sparse_attention import mosaic_tpu_backward as backward
from pallas_kernels.sparse_attention import mosaic_tpu_gather as gather
from pallas_kernels.sparse_attention import mosaic_tpu_kernel as kernel
from pallas_kernels.sparse_attention import mosaic_tpu_layout as layout
from pallas_kernels.sparse_attention import reference
from pallas_kernels.sparse_attention.reference import SparseMLAResiduals

Tiles = gather.Tiles
_LANES = layout.LANES
# By the batch or by the queries; the rows are whole, for any may be selected.
_SPLITS = tuple(
  tpu.Split((axis, latent_axis, axis), (axis, SparseMLAResiduals(axis, axis)))
  for axis, latent_axis in ((0, 0), (1, None))
)


def sparse_mla(
  query: Float[Array, "B T N C"],
  kv_latent: Float[Array, "B S C"],
  topk_indices: Int32[Array, "B T K"],
  *,
  scale: float,
  value_dim: int,
) -> tuple[Float[Array, "B T N {value_dim}"], SparseMLAResiduals]:
  """Packs `kv_latent` (a copy a call) and runs the kernel.

  A server keeps its cache packed and calls `sparse_mla_packed`.

  Raises:
    NotImplementedError: a chip, dtype or shape that the kernel can't run.
  """
  return _attend(query, kv_latent, topk_indices, scale, value_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(query, kv_latent, topk_indices, scale, value_dim):

  def attend(query, kv_latent, topk_indices):
    return sparse_mla_packed(
      query,
      layout.pack(kv_latent),
      topk_indices,
      scale=scale,
      value_dim=value_dim,
    )

  return tpu.over_devices(attend, (query, kv_latent, topk_indices), _SPLITS)


def _forward(query, kv_latent, topk_indices, scale, value_dim):
  arguments = (query.value, kv_latent.value, topk_indices.value)
  out, residuals = _attend(*arguments, scale, value_dim)
  return (out, residuals), (*arguments, out, residuals.log_sum_exp)


def _backward(scale, value_dim, saved, grads):
  query, kv_latent, topk_indices, out, log_sum_exp = saved
  grad_out, residuals = grads
  if not isinstance(residuals.mean_probs, SymbolicZero):
    # Needs the probabilities before their gradient: XLA computes everything.
    return _reference_backward(scale, value_dim, saved, grads)
  grads = tpu.over_devices(
    functools.partial(backward.sparse_mla_backward, scale=scale),
    (
      query,
      kv_latent,
      topk_indices,
      out,
      log_sum_exp,
      _materialise(grad_out),
      _materialise(residuals.log_sum_exp),
    ),
    # Not by the queries: each device would hold sums for all rows.
    [tpu.Split((0,) * 7, (0, 0))],
  )
  return (*grads, None)


def _reference_backward(scale, value_dim, saved, grads):
  query, kv_latent, topk_indices, *_ = saved
  _, vjp = jax.vjp(
    lambda query, kv_latent: reference.sparse_mla(
      query, kv_latent, topk_indices, scale=scale, value_dim=value_dim
    ),
    query,
    kv_latent,
  )
  is_zero = lambda x: isinstance(x, SymbolicZero)  # noqa: E731
  grads = jax.tree.map(_materialise, grads, is_leaf=is_zero)
  return (*vjp(grads), None)


def _materialise(grad):
  if isinstance(grad, SymbolicZero):
    return jnp.zeros(grad.shape, grad.dtype)
  return grad


_attend.defvjp(_forward, _backward, symbolic_zeros=True)


def sparse_mla_packed(
  query: Float[Array, "B T N C"],
  packed: layout.PackedLatent,
  topk_indices: Int32[Array, "B T K"],
  *,
  scale: float,
  value_dim: int,
  tiles: Tiles | None = None,
) -> tuple[Float[Array, "B T N {value_dim}"], SparseMLAResiduals]:
  """Attends to the selected rows of a packed cache, without a copy of it.

  Args:
    query: as in `sparse_mla`.
    packed: the cache; its `width` and `dtype` are `query`'s.
    topk_indices: as in `sparse_mla`.
    scale: factor on the logits.
    value_dim: leading columns of a row that are its value.
    tiles: None: `default_tiles`.

  Raises:
    NotImplementedError: a chip, dtype or shape that the kernel can't run.
  """

  def attend(query, words, topk_indices):
    return _attend_packed(
      query,
      dataclasses.replace(packed, words=words),
      topk_indices,
      scale=scale,
      value_dim=value_dim,
      tiles=tiles,
    )

  return tpu.over_devices(attend, (query, packed.words, topk_indices), _SPLITS)


def _attend_packed(query, packed, topk_indices, *, scale, value_dim, tiles):
  """`sparse_mla_packed` on one device."""
  chip = _check(query, packed.dtype, topk_indices)
  batch, num_queries, heads, width = query.shape
  count = topk_indices.shape[-1]
  flat = batch * num_queries
  if tiles is None:
    tiles = default_tiles(flat, count, chip)
  row_tiles = layout.row_tiles(packed.width, packed.dtype)
  num_chunks = -(-count // tiles.chunk)
  padded_flat = flat + -flat % tiles.cores
  problem = gather.Problem(
    heads=heads,
    value_dim=value_dim,
    row_tiles=row_tiles,
    num_chunks=num_chunks,
    steps=padded_flat // tiles.cores * num_chunks,
    tiles=tiles,
    scale=scale,
    dtype=query.dtype,
  )
  query = jnp.pad(
    query.reshape(flat, heads, width), ((0, padded_flat - flat), (0, 0), (0, 0))
  )
  selected = jnp.pad(
    topk_indices,
    ((0, 0), (0, 0), (0, num_chunks * tiles.chunk - count)),
    constant_values=-1,
  )
  rows = _first_rows(selected, packed, row_tiles).reshape(flat, -1)
  # The queries that even out the cores read row 0, and nobody reads them.
  rows = jnp.pad(rows, ((0, padded_flat - flat), (0, 0)))
  selected = jnp.pad(
    selected.reshape(flat, -1),
    ((0, padded_flat - flat), (0, 0)),
    constant_values=-1,
  )
  words = packed.words.reshape(-1, _LANES)
  out, log_sum_exp, mean_probs = kernel.call(
    problem, query, rows, selected, words
  )
  shape = (batch, num_queries)
  return (
    out[:flat].reshape(*shape, heads, value_dim),
    SparseMLAResiduals(
      log_sum_exp=log_sum_exp[:flat, 0, :heads].reshape(*shape, heads),
      mean_probs=mean_probs[:flat, 0, :count].reshape(*shape, count),
    ),
  )


def default_tiles(num_queries: int, count: int, chip: tpu.Chip) -> Tiles:
  """Tiles for `num_queries` queries of `count` rows on a chip.

  Prefill and decode take the same sizes. Cycles that compared them, 2048 rows
  and 64 heads on v5e, v6e: a lone query 15.7K, 13.3K in chunks of 512, 17.3K,
  15.1K of 256, 18.5K, 14.8K of 1024, for nothing overlaps its first and last
  chunk; one of many 10.0K, 9.1K of 512; 12.1K of 256 on v6e, for a step has a
  chain of latencies (product, maximum, exponential, product). A chunk starts
  two steps ahead: the wait for its last rows is then no part of a step.
  """
  return Tiles(
    chunk=min(512, _round_up(count, _LANES)),
    buffers=3,
    ahead=2,
    cores=min(chip.num_cores, num_queries),
  )


def _round_up(x, multiple):
  return -(-x // multiple) * multiple


def _check(query, dtype, topk_indices):
  """Returns the chip's description."""
  chip = tpu.chip()
  if query.dtype != dtype or dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      "needs query and latent both bfloat16 or both float32: got"
      f" {query.dtype} and {dtype}"
    )
  heads = query.shape[2]
  if heads > _LANES:
    raise NotImplementedError(f"needs at most {_LANES} heads: got {heads}")
  count = topk_indices.shape[-1]
  # The logits of a query stay in VMEM for the residuals.
  if 4 * heads * count > 1 << 22:
    raise NotImplementedError(
      "keeps 4 MiB of logits a query: got"
      f" {heads} heads x {count} rows x 4 bytes"
    )
  return chip


def _first_rows(selected, packed, row_tiles):
  """The first row of `words`, all batches merged, of each selected token."""
  batch, rows_per_batch, _ = packed.words.shape
  if batch * rows_per_batch >= 1 << 31:
    raise NotImplementedError(
      f"counts rows of 128 words in int32: got {batch} x {rows_per_batch}"
    )
  # Clipped here, once, for the kernel runs without bounds checks.
  token = jnp.minimum(selected, packed.num_keys - 1)
  token = jnp.where(selected < 0, packed.num_keys, token)
  start = jnp.arange(batch, dtype=jnp.int32) * rows_per_batch
  return token * row_tiles + start[:, None, None]
