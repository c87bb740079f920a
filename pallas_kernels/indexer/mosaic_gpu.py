# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer on Hopper GPUs.

Two kernels: one where queries fill the rows of the matrix units, one for
decoding, where keys do.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import chunking
from pallas_kernels.hopper import chip as chip_lib
from pallas_kernels.indexer import (
  mosaic_gpu_decode_kernel,
  mosaic_gpu_kernel,
  mosaic_gpu_schedule,
  reference,
)
from pallas_kernels.topk import mosaic_gpu as topk_gpu

_DTYPES = ("bfloat16", "float8_e4m3fn")
# Columns that the matrix units read at full width.
_DIMS = (64, 128)
# Left for barriers and alignment.
_SPARE_BYTES = 2048
# Asynchronous copies of queries begin and end at multiples of it.
_QUERIES = 8
# Keys of a tile of shared memory: a copy puts zeros behind the last whole one.
_ROWS = 8
# Float32 of a line of the cache, at which each row of scores begins: what JAX
# asks of vectors that are stored to rows.
_KEYS = 32
# A product's columns come in eights.
_HEADS = 8
# Queries times heads that stay in shared memory while keys stream past.
_MOST_COLUMNS = 256
_MOST_STAGES = 16
# Hopper: the fastest that were tried on an H200 as the kernels were written;
# `experiments.sweep_tiles` times others. 0 stages are as many as the shared
# memory fits. Two thread blocks that share their queries halve the reads of the
# second-level cache and the power for them, 2 to 4% of time.
MANY_QUERIES = mosaic_gpu_kernel.Tiles(
  warpgroups=3, keys=128, stages=0, members=2
)
FEW_QUERIES = mosaic_gpu_decode_kernel.Tiles(warpgroups=4, stages=0)
# A chunk's scores may fill as many of `chunking.CHUNK_BYTES`, half of what the
# op may hold: they are its only large array, and it takes a thousand queries
# to keep the GPU busy.
_CHUNKS_TOGETHER = 4


def indexer_scores(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  key_scale: Float32[Array, "B S"] | None = None,
  *,
  tiles: mosaic_gpu_kernel.Tiles | mosaic_gpu_decode_kernel.Tiles | None = None,
) -> Float32[Array, "B T S"]:
  """Scores of a chunk of queries; the backward pass is the reference's.

  The scores are padded, and copied once, where S is not a multiple of 32 or
  below a tile, and where T, too large for the decoding kernel, is not a
  multiple of 8 or below 64. The keys are, where S is not a multiple of 8 or
  below a tile.

  Args:
    index_q: queries, bfloat16 or float8_e4m3fn.
    index_k: keys, of the same dtype.
    index_weights: head weights.
    key_start: first visible key of each query.
    key_end: one past the last.
    key_scale: factor of each key's scores; its gradient is 0.
    tiles: for a sweep; None: those of the number of queries.

  Raises:
    NotImplementedError: the chip, dtype or head dim.
  """
  chip = _check(index_q, index_k)

  def scores(index_q, index_k, *others):
    padded = _scores(index_q, index_k, *others, chip=chip, tiles=tiles)
    return padded[:, : index_q.shape[1], : index_k.shape[1]]

  return reference.with_gradient(scores)(
    index_q, index_k, index_weights, key_start, key_end, key_scale
  )


def indexer_topk(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  k: int,
  key_scale: Float32[Array, "B S"] | None = None,
  *,
  memory_bytes: int = chunking.MEMORY_BYTES,
) -> Int32[Array, "B T {k}"]:
  """Scores and selects, a chunk of queries at a time.

  Raises:
    NotImplementedError: as `indexer_scores` and `top_k` of this lowering.
  """
  chip = _check(index_q, index_k)

  def select(per_query, keys):
    index_q, index_weights, key_start, key_end = per_query
    index_k, key_scale = keys
    # Nothing is written behind what a block of queries sees, which `top_k` must
    # not read: it reads up to a query's end, of one without keys nothing.
    scores = _scores(
      index_q,
      index_k,
      index_weights,
      key_start,
      key_end,
      key_scale,
      chip=chip,
      fills_behind=False,
    )
    lengths = jnp.clip(key_end, 0, index_k.shape[1])
    lengths = jnp.where(key_start < lengths, lengths, 0)
    lengths = _pad(lengths, 1, to=scores.shape[1])
    return topk_gpu.top_k(scores, k, lengths)[:, : index_q.shape[1]]

  return chunking.fill_windows(
    select,
    (index_q, index_weights, key_start, key_end),
    (index_k, key_scale),
    bytes_each=4 * index_k.shape[1] // _CHUNKS_TOGETHER,
    memory_bytes=memory_bytes,
  )


def _check(index_q, index_k) -> chip_lib.Chip:
  chip = chip_lib.chip()
  if index_q.dtype != index_k.dtype:
    raise NotImplementedError(
      f"needs queries and keys of one dtype: got {index_q.dtype} and"
      f" {index_k.dtype}"
    )
  if index_q.dtype.name not in _DTYPES:
    raise NotImplementedError(
      f"the kernel multiplies {', '.join(_DTYPES)}: got {index_q.dtype}"
    )
  if index_q.shape[-1] > _DIMS[-1]:
    raise NotImplementedError(
      f"needs a head dim of at most {_DIMS[-1]}: got {index_q.shape[-1]}"
    )
  return chip


def _scores(
  index_q, index_k, index_weights, key_start, key_end, key_scale=None, *,
  chip, fills_behind=True, tiles=None,
):  # fmt: skip
  """Scores `[B, >= T, >= S]`; with padding of either axis behind."""
  dim = next(dim for dim in _DIMS if dim >= index_q.shape[-1])
  index_q, index_k = (_pad(x, -1, to=dim) for x in (index_q, index_k))
  row_bytes = dim * index_q.dtype.itemsize
  tiles = _tiles(*index_q.shape[1:3], row_bytes, tiles)
  num_keys = index_k.shape[1]
  # Padding is behind every `key_end`.
  key_start, key_end = (jnp.clip(x, 0, num_keys) for x in (key_start, key_end))
  index_k = _pad(index_k, 1, to=max(_round_up(num_keys, _ROWS), tiles.width))
  num_keys = max(_round_up(num_keys, _KEYS), tiles.width)
  if key_scale is not None:
    key_scale = _pad(key_scale, 1, to=num_keys)
  is_decode = isinstance(tiles, mosaic_gpu_decode_kernel.Tiles)
  call = _score_few if is_decode else _score_many
  return call(
    index_q, index_k, index_weights, key_start, key_end, key_scale,
    fills_behind=fills_behind, num_keys=num_keys, tiles=tiles,
    num_blocks=chip.num_multiprocessors,
  )  # fmt: skip


def _tiles(num_queries, heads, row_bytes, tiles=None):
  """The given tiles, or those of the shape; with stages."""
  rows = num_queries * _round_up(heads, _HEADS)
  tiles = tiles or (FEW_QUERIES if rows <= _MOST_COLUMNS else MANY_QUERIES)
  if tiles.stages:
    return tiles
  if isinstance(tiles, mosaic_gpu_decode_kernel.Tiles):
    stages = _stages(rows * row_bytes, tiles.width * row_bytes)
    return tiles._replace(stages=stages)
  stages = _stages(
    tiles.block_width * row_bytes, mosaic_gpu_kernel.QUERIES * row_bytes
  )
  return tiles._replace(stages=1 << (stages.bit_length() - 1))


def _stages(resident_bytes, stage_bytes):
  """Stages of a ring beside what stays in shared memory."""
  free = chip_lib.SMEM_BYTES - _SPARE_BYTES - resident_bytes
  return min(free // stage_bytes, _MOST_STAGES)


def _score_few(
  index_q, index_k, index_weights, key_start, key_end, key_scale, *,
  fills_behind, **grid,
):  # fmt: skip
  heads = _round_up(index_q.shape[2], _HEADS)
  schedule = mosaic_gpu_schedule.schedule(
    key_start,
    key_end,
    num_keys=grid["num_keys"],
    width=grid["tiles"].width,
    fills_behind=fills_behind,
  )
  return mosaic_gpu_decode_kernel.scores(
    _pad(index_q, 2, to=heads),
    index_k,
    _pad(index_weights, 2, to=heads),
    key_start,
    key_end,
    key_scale,
    schedule,
    **grid,
  )


def _score_many(
  index_q, index_k, index_weights, key_start, key_end, key_scale, *,
  fills_behind, **grid,
):  # fmt: skip
  num_queries = max(
    _round_up(index_q.shape[1], _QUERIES), mosaic_gpu_kernel.QUERIES
  )
  # A query that pads sees no key.
  index_q, index_weights, key_start, key_end = (
    _pad(x, 1, to=num_queries)
    for x in (index_q, index_weights, key_start, key_end)
  )
  key_start, key_end, weights = map(
    _query_blocks, (key_start, key_end, index_weights)
  )
  schedule = mosaic_gpu_schedule.schedule(
    key_start,
    key_end,
    num_keys=grid["num_keys"],
    width=grid["tiles"].width,
    fills_behind=fills_behind,
  )
  return mosaic_gpu_kernel.scores(
    index_q,
    index_k,
    jnp.swapaxes(weights, 2, 3),
    key_start,
    key_end,
    key_scale,
    schedule,
    **grid,
  )


def _query_blocks(x):
  """Blocks `[B, blocks, 64, ...]`; the last one repeats queries before it."""
  size = mosaic_gpu_kernel.QUERIES
  whole = x.shape[1] // size * size
  if whole != x.shape[1]:
    x = jnp.concatenate([x[:, :whole], x[:, -size:]], axis=1)
  return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _round_up(n, multiple):
  return -(-n // multiple) * multiple


def _pad(x, axis, *, to):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, to - x.shape[axis])
  return jnp.pad(x, padding) if padding[axis][1] else x
