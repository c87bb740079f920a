# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The gradients of sparse MLA on a TPU: what surrounds the kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import chunking, tpu
from pallas_kernels.sparse_attention import mosaic_tpu_backward_kernel as kernel
from pallas_kernels.sparse_attention import mosaic_tpu_gather as gather
from pallas_kernels.sparse_attention import packing

_LANES = packing.LANES
# Rows of a register of bfloat16: two arrays of heads stand on each other.
_HEADS = 16


def sparse_mla_backward(
  query: Float[Array, "B T N C"],
  kv_latent: Float[Array, "B S C"],
  topk_indices: Int32[Array, "B T K"],
  out: Float[Array, "B T N V"],
  log_sum_exp: Float32[Array, "B T N"],
  grad_out: Float[Array, "B T N V"],
  grad_log_sum_exp: Float32[Array, "B T N"],
  *,
  scale: float,
  tiles: gather.Tiles | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B S C"]]:
  """Gradients of the queries and of the rows.

  Args:
    query: as the forward's.
    kv_latent: as the forward's.
    topk_indices: as the forward's. Of a row that a query has twice, one term
      would be lost.
    out: the forward's.
    log_sum_exp: the forward's.
    grad_out: of `out`.
    grad_log_sum_exp: of `log_sum_exp`.
    scale: factor on the logits.
    tiles: None: `default_tiles`; `buffers` 2, `ahead` 1.

  Returns:
    In the dtypes of `query` and `kv_latent`, the same in every run: the rows'
    gradient is a float32 sum in the order of the queries. Memory: for each
    core B x S rows of 3 KiB (576 columns of bfloat16), a packed latent, and
    some arrays of `chunking.CHUNK_BYTES`.
  """
  batch, num_queries, heads, width = query.shape
  count, num_keys = topk_indices.shape[-1], kv_latent.shape[1]
  flat = batch * num_queries
  tiles = tiles or default_tiles(flat, count, tpu.chip())
  num_chunks = -(-count // tiles.chunk)
  row_tiles = packing.row_tiles(width, query.dtype)
  columns = kernel.columns(row_tiles, query.dtype)
  padded_heads = heads + -heads % _HEADS
  # The arrays that are padded to whole tiles are those of a part.
  part = _queries_of_part(
    flat, padded_heads * columns * query.dtype.itemsize, tiles.cores
  )
  problem = gather.Problem(
    heads=padded_heads,
    value_dim=out.shape[-1],
    row_tiles=row_tiles,
    num_chunks=num_chunks,
    steps=part // tiles.cores * num_chunks,
    tiles=tiles,
    scale=scale,
    dtype=query.dtype,
  )
  # Each place of two chunks, which may be on their way together, has a token of
  # its own for "none", so that no two copies meet.
  nones = 2 * tiles.chunk
  packed = packing.pack(jnp.pad(kv_latent, ((0, 0), (0, nones), (0, 0))))
  words = packed.words.reshape(-1, _LANES)
  rows_a_batch = packed.words.shape[1]
  none = num_keys + jnp.arange(num_chunks * tiles.chunk) % nones

  def of_part(sums, arrays):
    query, grad_out, out, log_sum_exp, grad_log_sum_exp, selected, batch = (
      arrays
    )
    delta = jnp.sum(
      grad_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1
    )
    # A query without rows may come with any gradient of its -inf.
    has_rows = log_sum_exp > -jnp.inf
    delta -= jnp.where(has_rows, grad_log_sum_exp, 0.0)
    selected = _pad(selected, num_chunks * tiles.chunk, value=-1)
    token = jnp.where(selected < 0, none, jnp.minimum(selected, num_keys - 1))
    grad_query, sums = kernel.call(
      problem,
      _pad(query, padded_heads, columns),
      _pad(grad_out, padded_heads, columns),
      _pad(log_sum_exp, _LANES)[:, None],
      _pad(delta, _LANES)[:, None],
      token * row_tiles + batch[:, None] * rows_a_batch,
      selected,
      words,
      sums,
    )
    return sums, grad_query[:, :heads, :width]

  def in_parts(x, value=0):
    x = x.reshape(flat, *x.shape[2:])
    padding = [(0, -flat % part)] + [(0, 0)] * (x.ndim - 1)
    x = jnp.pad(x, padding, constant_values=value)
    return x.reshape(-1, part, *x.shape[1:])

  batches = jnp.broadcast_to(
    jnp.arange(batch, dtype=jnp.int32)[:, None], (batch, num_queries)
  )
  floats = query, grad_out, out, log_sum_exp, grad_log_sum_exp
  sums, grad_query = jax.lax.scan(
    of_part,
    kernel.no_sums(problem, words),
    # Queries behind the last select nothing.
    (*map(in_parts, floats), in_parts(topk_indices, -1), in_parts(batches)),
  )
  grad_query = grad_query.reshape(-1, heads, width)[:flat]
  sums = sums.reshape(tiles.cores, batch, -1).sum(axis=0)
  grad_latent = sums[:, : num_keys * columns].reshape(batch, num_keys, columns)
  return (
    grad_query.reshape(query.shape),
    grad_latent[..., :width].astype(kv_latent.dtype),
  )


def _queries_of_part(num_queries, bytes_per_query, cores):
  """A power of two, so that it divides most calls; at least one a core."""
  part = cores
  while part < num_queries and 2 * part * bytes_per_query <= (
    chunking.CHUNK_BYTES
  ):
    part *= 2
  return part


def _pad(x, *sizes, value=0):
  """Pads the axes behind the first to `sizes`."""
  padding = [(0, 0)]
  for size, n in zip(sizes, x.shape[1:], strict=True):
    padding.append((0, size - n))
  return jnp.pad(x, padding, constant_values=value)


def default_tiles(num_queries: int, count: int, chip: tpu.Chip) -> gather.Tiles:
  """Tiles for `num_queries` queries of `count` rows on a chip."""
  return gather.Tiles(
    chunk=min(256, count + -count % _LANES),
    buffers=2,
    ahead=1,
    cores=min(chip.num_cores, num_queries),
  )
