# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense attention's statistics on Hopper GPUs, in two passes over the keys."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dense_attention import (
  mosaic_gpu_probs,
  mosaic_gpu_stream,
  mosaic_gpu_sums,
)
from pallas_kernels.hopper import chip as chip_lib
from pallas_kernels.indexer import mosaic_gpu_schedule as schedule_lib

_ROWS = mosaic_gpu_stream.ROWS
# Asynchronous copies begin and end at multiples of it.
_QUERIES = 8
# Float32 of a line of the cache, at which each row of probabilities begins:
# what JAX asks of vectors that are stored to rows.
_KEYS = 32
_MOST_COLUMNS = 576


class Tiles(NamedTuple):
  """What a sweep on a card decides.

  Attributes:
    members: thread blocks that share a stream: two halve the reads of the
      second-level cache, whose bandwidth is the bound without.
    segment: blocks of 128 keys that an item of the first pass streams: some
      more work than loading its rows, and items enough to share out evenly.
  """

  members: int
  segment: int


# Hopper: the fastest that were tried on an H200 as the kernels were written;
# `experiments.sweep_tiles` times others.
TILES = Tiles(members=2, segment=32)


def dense_mla_residuals(
  query: Float[Array, "B T N C"],
  kv_latent: Float[Array, "B S C"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  *,
  scale: float,
  tiles: Tiles | None = None,
) -> tuple[Float32[Array, "B T N"], Float32[Array, "B T S"]]:
  """Log-sum-exp first, for the probabilities cannot be averaged without.

  The probabilities are padded, and copied once, where S is not a multiple of 32
  or below 256, and where T is not a multiple of 8 or below 128. Fewer than 128
  queries cost as much as 128.

  Args:
    query: queries, bfloat16.
    kv_latent: latents, bfloat16.
    key_start: first visible key of each query.
    key_end: one past the last.
    scale: factor on the logits.
    tiles: for a sweep; None: `TILES`.

  Raises:
    NotImplementedError: the chip, dtype or width.
  """
  chip = _check(query, kv_latent)
  num_queries, num_keys = query.shape[1], kv_latent.shape[1]
  tiles = tiles or TILES
  grid = mosaic_gpu_stream.Grid(
    chip.num_multiprocessors // tiles.members, tiles.members
  )
  # Padding is behind every key_end, and a query that pads sees no key.
  key_start, key_end = (jnp.clip(x, 0, num_keys) for x in (key_start, key_end))
  least_queries = max(_ROWS, -(-grid.rows // query.shape[2]))
  query, key_start, key_end = (
    _pad_rows(x, least_queries, _QUERIES) for x in (query, key_start, key_end)
  )
  kv_latent = _pad_rows(kv_latent, grid.rows, _KEYS)
  query, kv_latent = (
    _pad(x, -1, -x.shape[-1] % mosaic_gpu_stream.COLUMNS)
    for x in (query, kv_latent)
  )
  arrays = (query, kv_latent, key_start, key_end)
  # Powers of two are what the chip computes.
  settings = {"scale": scale * math.log2(math.e), "grid": grid}
  log2_sums = _log2_sums(*arrays, **settings, segment=tiles.segment)
  probs = _mean_probs(*arrays, log2_sums, **settings)
  return (
    log2_sums[:, :num_queries] * math.log(2),
    probs[:, :num_queries, :num_keys],
  )


def _check(query, kv_latent) -> chip_lib.Chip:
  chip = chip_lib.chip()
  for array in (query, kv_latent):
    if array.dtype != jnp.bfloat16:
      raise NotImplementedError(
        f"the kernel multiplies bfloat16: got {array.dtype}"
      )
  if query.shape[-1] > _MOST_COLUMNS:
    raise NotImplementedError(
      f"shared memory fits up to {_MOST_COLUMNS} columns: got {query.shape[-1]}"
    )
  return chip


def _log2_sums(query, kv_latent, key_start, key_end, *, scale, grid, segment):
  batch, num_queries, heads, width = query.shape
  rows = query.reshape(batch, num_queries * heads, width)
  start, end = (
    _row_blocks(jnp.repeat(x, heads, axis=1), grid.rows)
    for x in (key_start, key_end)
  )
  blocks = schedule_lib.schedule(
    start,
    end,
    num_keys=kv_latent.shape[1],
    width=_ROWS,
    fills_behind=False,
  )
  bounds = mosaic_gpu_sums.Bounds(
    blocks.first, blocks.first + jnp.diff(blocks.offset)
  )
  segments = mosaic_gpu_sums.segments(bounds, segment)
  sums = mosaic_gpu_sums.log2_sums(
    rows,
    kv_latent,
    start,
    end,
    segments,
    bounds,
    scale=scale,
    segment=segment,
    grid=grid,
  )
  sums = _joined(sums, segments, grid.rows)
  return sums.reshape(batch, num_queries, heads)


def _joined(sums, segments, block_rows):
  """Log2 of the sums over all segments: those that were not seen add 0."""
  batch, num_segments, num_rows = sums.shape
  first = segments.first.reshape(batch, -1)
  last = first + jnp.diff(segments.offset).reshape(batch, -1)
  block = jnp.arange(num_rows) // block_rows
  # Rows of the last block that others hold too were written by either alike.
  numbers = jnp.arange(num_segments)[:, None]
  is_seen = (numbers >= first[:, None, block]) & (
    numbers < last[:, None, block]
  )
  sums = jnp.where(is_seen, sums, -jnp.inf)
  top = jnp.max(sums, axis=1)
  shift = jnp.where(top > -jnp.inf, top, 0.0)
  total = jnp.sum(jnp.exp2(sums - shift[:, None]), axis=1)
  return shift + jnp.log2(total)


def _mean_probs(
  query, kv_latent, key_start, key_end, log2_sums, *, scale, grid
):
  start, end, log2_sums = (
    _row_blocks(x, _ROWS) for x in (key_start, key_end, log2_sums)
  )
  schedule = schedule_lib.schedule(
    start,
    end,
    num_keys=kv_latent.shape[1],
    width=grid.rows,
    fills_behind=True,
  )
  # A query that sees no key has no probability, for which 2 ** -inf will do.
  log2_sums = jnp.where(log2_sums > -jnp.inf, log2_sums, jnp.inf)
  return mosaic_gpu_probs.mean_probs(
    query,
    kv_latent,
    jnp.swapaxes(log2_sums, 2, 3),
    start,
    end,
    schedule,
    scale=scale,
    grid=grid,
  )


def _row_blocks(x, size):
  """Blocks `[B, blocks, size, ...]`; the last one repeats rows before it."""
  whole = x.shape[1] // size * size
  if whole != x.shape[1]:
    x = jnp.concatenate([x[:, :whole], x[:, -size:]], axis=1)
  return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _pad_rows(x, at_least, multiple):
  rows = max(x.shape[1], at_least)
  rows += -rows % multiple
  return _pad(x, 1, rows - x.shape[1])


def _pad(x, axis, count):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, count)
  return jnp.pad(x, padding) if count else x
