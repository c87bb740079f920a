# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which tiles a persistent grid computes, fills with -inf, or passes over.

A row is a block of queries of one sequence of the batch; its tiles are blocks
of keys. What a row sees is one run of blocks. The tiles of all rows are
numbered through, so that every thread block gets as many as every other,
whatever the rows see.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32


class Schedule(NamedTuple):
  """Tiles of each row.

  Attributes:
    first: the first visible block of keys.
    offset: number of visible tiles before each row, and of all.
    fill_offset: the same of the tiles that are filled; None: none are.
  """

  first: Int32[Array, "R"]
  offset: Int32[Array, "R1"]
  fill_offset: Int32[Array, "R1"] | None


def schedule(
  key_start: Int32[Array, "*R Q"],
  key_end: Int32[Array, "*R Q"],
  *,
  num_keys: int,
  width: int,
  fills_behind: bool,
) -> Schedule:
  """Returns the tiles that rows of queries see.

  Args:
    key_start: first visible key of each query of each row.
    key_end: one past the last.
    num_keys: at least `width`.
    width: keys of a tile. The last tile ends with the keys: it repeats some of
      the one before.
    fills_behind: fill unseen tiles on both sides; else only those before what
      is visible.
  """
  start = jnp.maximum(key_start, 0)
  end = jnp.minimum(key_end, num_keys)
  is_empty = start >= end
  start = jnp.min(jnp.where(is_empty, num_keys, start), axis=-1).reshape(-1)
  end = jnp.max(jnp.where(is_empty, 0, end), axis=-1).reshape(-1)
  blocks = -(-num_keys // width)
  last = jnp.where(end > num_keys - width, blocks, -(-end // width))
  first = jnp.minimum(start // width, last)
  count = last - first
  fill = blocks - count if fills_behind else first
  return numbered(first, count, fill)


def numbered(first, count, fill=None) -> Schedule:
  """The schedule of rows that each see `count` blocks from `first` on."""
  fill_offset = None if fill is None else _sums_before(fill)
  return Schedule(first, _sums_before(count), fill_offset)


def _sums_before(counts):
  """Exclusive prefix sums and the total, in one small kernel."""
  rows = counts.shape[0]
  is_before = jnp.arange(rows) < jnp.arange(rows + 1)[:, None]
  return jnp.sum(jnp.where(is_before, counts, 0), axis=1, dtype=jnp.int32)


def share(offset_ref, block, num_blocks: int):
  """Begin and end of a thread block's run of items."""
  total = offset_ref[offset_ref.shape[0] - 1]
  begin, end = (
    lax.div(total * n, jnp.int32(num_blocks)) for n in (block, block + 1)
  )
  return begin, end


def strided_count(offset_ref, block, num_blocks: int):
  """Number of items `block + n * num_blocks`."""
  total = offset_ref[offset_ref.shape[0] - 1]
  return lax.div(total - block + (num_blocks - 1), jnp.int32(num_blocks))


def find(offset_ref, item, row):
  """The row of an item, not before `row`, and its rank there."""
  row = lax.while_loop(
    lambda row: offset_ref[row + 1] <= item, lambda row: row + 1, row
  )
  return row, item - offset_ref[row]


def visible_block(schedule_refs: Schedule, item, row):
  """Row and block of keys of a visible tile."""
  row, rank = find(schedule_refs.offset, item, row)
  return row, schedule_refs.first[row] + rank


def unseen_block(schedule_refs: Schedule, item, row):
  """Row and block of keys of a tile to fill."""
  first, offset, fill_offset = schedule_refs
  row, rank = find(fill_offset, item, row)
  seen = offset[row + 1] - offset[row]
  return row, jnp.where(rank < first[row], rank, rank + seen)


def tile_begin(block, width: int, length: int):
  """Where a block begins; the last one ends with the array."""
  return jnp.minimum(block * width, length - width)
