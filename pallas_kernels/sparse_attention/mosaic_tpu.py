# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse MLA on a TPU's TensorCore: one row copy for each selected row.

`packing` is the form of the cache that can be read a row at a time,
`mosaic_tpu_kernel` the kernel, `mosaic_tpu_merge` joins the parts of a lone
query; here are the two entries, their limits and sizes.
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
from pallas_kernels.sparse_attention import mosaic_tpu_merge as merge
from pallas_kernels.sparse_attention import packing, reference
from pallas_kernels.sparse_attention.reference import SparseMLAResiduals

Tiles = gather.Tiles
_LANES = packing.LANES
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
  with_mean_probs: bool = True,
) -> tuple[Float[Array, "B T N {value_dim}"], SparseMLAResiduals]:
  """Packs `kv_latent` (a copy a call) and runs the kernel.

  A server keeps its cache packed and calls `sparse_mla_packed`, which has the
  same arguments.

  Raises:
    NotImplementedError: a chip, dtype or shape that the kernel can't run.
  """
  return _attend(
    query, kv_latent, topk_indices, scale, value_dim, with_mean_probs
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(query, kv_latent, topk_indices, scale, value_dim, with_mean_probs):

  def attend(query, kv_latent, topk_indices):
    return sparse_mla_packed(
      query,
      packing.pack(kv_latent),
      topk_indices,
      scale=scale,
      value_dim=value_dim,
      with_mean_probs=with_mean_probs,
    )

  return tpu.over_devices(attend, (query, kv_latent, topk_indices), _SPLITS)


def _forward(query, kv_latent, topk_indices, scale, value_dim, with_mean_probs):
  arguments = (query.value, kv_latent.value, topk_indices.value)
  out, residuals = _attend(*arguments, scale, value_dim, with_mean_probs)
  return (out, residuals), (*arguments, out, residuals.log_sum_exp)


def _backward(scale, value_dim, with_mean_probs, saved, grads):
  query, kv_latent, topk_indices, out, log_sum_exp = saved
  grad_out, residuals = grads
  if with_mean_probs and not isinstance(residuals.mean_probs, SymbolicZero):
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
  packed: packing.PackedLatent,
  topk_indices: Int32[Array, "B T K"],
  *,
  scale: float,
  value_dim: int,
  with_mean_probs: bool = True,
  tiles: Tiles | None = None,
) -> tuple[Float[Array, "B T N {value_dim}"], SparseMLAResiduals]:
  """Attends to the selected rows of a packed cache, without a copy of it.

  Args:
    query: as in `sparse_mla`.
    packed: the cache; its `width` and `dtype` are `query`'s.
    topk_indices: as in `sparse_mla`.
    scale: factor on the logits.
    value_dim: leading columns of a row that are its value.
    with_mean_probs: False: `mean_probs` of the residuals is None. A second
      exponential of every logit saved; with 128 heads on v5e a third of all
      cycles.
    tiles: None: `default_tiles`; `parts` above 1 only without mean
      probabilities.

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
      with_mean_probs=with_mean_probs,
      tiles=tiles,
    )

  return tpu.over_devices(attend, (query, packed.words, topk_indices), _SPLITS)


def _attend_packed(
  query, packed, topk_indices, *, scale, value_dim, with_mean_probs, tiles
):
  """`sparse_mla_packed` on one device."""
  chip = _check(query, packed.dtype, topk_indices, with_mean_probs)
  batch, num_queries, heads, width = query.shape
  count = topk_indices.shape[-1]
  flat = batch * num_queries
  if tiles is None:
    tiles = default_tiles(flat, count, chip, with_mean_probs)
  row_tiles = packing.row_tiles(packed.width, packed.dtype)
  num_chunks = -(-count // (tiles.chunk * tiles.parts))
  # Parts of as many queries as even out the cores.
  padded_flat = flat + -flat % max(tiles.cores // tiles.parts, 1)
  num_parts = padded_flat * tiles.parts
  problem = gather.Problem(
    heads=heads,
    value_dim=value_dim,
    row_tiles=row_tiles,
    num_chunks=num_chunks,
    steps=num_parts // tiles.cores * num_chunks,
    tiles=tiles,
    scale=scale,
    dtype=query.dtype,
    with_mean_probs=with_mean_probs,
  )
  query = jnp.pad(
    query.reshape(flat, heads, width), ((0, padded_flat - flat), (0, 0), (0, 0))
  )
  padded_count = tiles.parts * num_chunks * tiles.chunk
  selected = jnp.pad(
    topk_indices,
    ((0, 0), (0, 0), (0, padded_count - count)),
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
  out, log_sum_exp, mean_probs = kernel.call(
    problem,
    query,
    rows.reshape(num_parts, -1),
    selected.reshape(num_parts, -1),
    packed.words.reshape(-1, _LANES),
  )
  if tiles.parts > 1:
    out, log_sum_exp = merge.call(out, log_sum_exp, tiles.parts, query.dtype)
  if with_mean_probs:
    mean_probs = mean_probs[:flat, 0, :count].reshape(batch, num_queries, count)
  shape = (batch, num_queries, heads)
  return (
    out[:flat].reshape(*shape, value_dim),
    SparseMLAResiduals(
      log_sum_exp[:flat, 0, :heads].reshape(shape), mean_probs
    ),
  )


def default_tiles(
  num_queries: int, count: int, chip: tpu.Chip, with_mean_probs: bool = False
) -> Tiles:
  """Tiles for `num_queries` queries of `count` rows on a chip.

  Prefill and decode take the same sizes. Cycles that compared them, eight
  queries of 2048 rows and 64 heads on v5e, v5p, v6e: 76.4K, 39.8K, 72.0K in
  chunks of 512 that start three steps ahead; 82.3K, 38.3K, 70.6K two steps
  ahead, 155K (v5e) one step ahead, for then a step waits for its rows; 45.1K
  (v5p) of 256, for a step has a chain of latencies (product, maximum,
  exponential, product). A lone query on v5e, v6e: 16.8K, 14.5K; 17.0K, 14.1K of
  256, for nothing overlaps its ends.
  """
  # Mean probabilities need each head's sum over all rows first.
  if num_queries < chip.num_cores and not with_mean_probs:
    return _tiles_of_parts(count, chip.num_cores)
  return Tiles(
    chunk=min(512, _round_up(count, _LANES)),
    buffers=4,
    ahead=3,
    cores=min(chip.num_cores, num_queries),
  )


def _tiles_of_parts(count, cores):
  """Tiles for a lone query, whose rows all cores share.

  Of the two cores of v5p, 2048 rows, 64 heads: 8.6K cycles in chunks of 256
  that start two steps ahead, 9.6K three steps ahead, 9.3K of 512; and 1.8K to
  merge the parts. One core takes 14.6K.
  """
  return Tiles(
    chunk=min(256, _round_up(-(-count // cores), _LANES)),
    buffers=4,
    ahead=2,
    cores=cores,
    parts=cores,
  )


def _round_up(x, multiple):
  return -(-x // multiple) * multiple


def _check(query, dtype, topk_indices, with_mean_probs):
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
  # The logits of a query stay in VMEM for the mean probabilities.
  if with_mean_probs and 4 * heads * count > 1 << 22:
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
