# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The first pass: log-sum-exp of the logits, in segments of the keys.

Rows are queries times heads, which share the keys: a thread block keeps 128 of
them while a segment of keys streams past, with a running maximum and sum a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32

from pallas_kernels.dense_attention import mosaic_gpu_stream as stream
from pallas_kernels.indexer import mosaic_gpu_schedule as schedule_lib


class Bounds(NamedTuple):
  """Blocks of 128 keys that the blocks of rows see.

  Attributes:
    first: the first one.
    last: one past the last.
  """

  first: Int32[Array, "R"]
  last: Int32[Array, "R"]


def segments(bounds: Bounds, segment: int) -> schedule_lib.Schedule:
  """Returns the segments of `segment` blocks that the rows see."""
  first = bounds.first // segment
  count = -(-bounds.last // segment) - first
  return schedule_lib.numbered(first, count)


def log2_sums(
  rows,
  kv_latent,
  key_start,
  key_end,
  schedule: schedule_lib.Schedule,
  bounds: Bounds,
  *,
  scale: float,
  segment: int,
  grid: stream.Grid,
) -> Float32[Array, "B G R"]:
  """Log2 of the sums of 2 ** (scale * logit) over segments of the keys.

  Args:
    rows: queries times heads `[B, R, C]`, R a multiple of 8, at least a block:
      the rows of a cluster.
    kv_latent: latents `[B, S, C]`, S a multiple of 8, at least 128.
    key_start: first visible key of each row, by block `[B, blocks, rows]`; the
      last block ends with the rows.
    key_end: one past the last.
    schedule: segments seen by the blocks of rows.
    bounds: blocks of keys seen by them.
    scale: factor on the logits.
    segment: blocks of 128 keys in a segment.
    grid: thread blocks.

  Returns:
    By segment; undefined where a block of rows does not see the segment.
  """
  batch, num_rows, width = rows.shape
  segments = -(-kv_latent.shape[1] // (segment * stream.ROWS))
  return stream.call(
    functools.partial(_kernel, scale=scale, segment=segment, grid=grid),
    jax.ShapeDtypeStruct((batch, segments, num_rows), jnp.float32),
    (rows, kv_latent, key_start, key_end, *schedule[:2], *bounds),
    width=width,
    dtype=rows.dtype,
    grid=grid,
  )


def _kernel(
  rows_ref, keys_ref, start_ref, end_ref, first_ref, offset_ref, low_ref,
  high_ref, out_ref, *, memory, scale, segment, grid,
):  # fmt: skip
  cluster = lax.axis_index("cluster")
  row_blocks = start_ref.shape[1]
  num_rows, num_keys = rows_ref.shape[1], keys_ref.shape[1]
  schedule = schedule_lib.Schedule(first_ref, offset_ref, None)
  items = schedule_lib.strided_count(offset_ref, cluster, grid.clusters)

  def place(step, row):
    """Sequence, block of rows, segment, and the keys of an item."""
    row, part = schedule_lib.visible_block(
      schedule, cluster + step * grid.clusters, row
    )
    low = jnp.maximum(low_ref[row], part * segment)
    high = jnp.minimum(high_ref[row], (part + 1) * segment)
    sequence = lax.div(row, jnp.int32(row_blocks))
    row_block = lax.rem(row, jnp.int32(row_blocks))
    return row, sequence, row_block, part, (low, high)

  def row_begin(row_block):
    begin = schedule_lib.tile_begin(row_block, grid.rows, num_rows)
    return begin + grid.member() * stream.ROWS

  def key_begin(key_block):
    return schedule_lib.tile_begin(key_block, stream.ROWS, num_keys)

  def produce():
    def load_item(step, carry):
      row, loaded = carry
      row, sequence, row_block, _, key_blocks = place(step, row)
      stream.load_resident(
        memory,
        stream.rows_of(rows_ref, sequence, row_begin(row_block)),
        step,
      )

      def load_keys(key_block, loaded):
        source = stream.rows_of(keys_ref, sequence, key_begin(key_block))
        return stream.load_stream(memory, source, loaded, grid)

      return row, lax.fori_loop(*key_blocks, load_keys, loaded)

    _, loaded = lax.fori_loop(0, items, load_item, (jnp.int32(0), jnp.int32(0)))
    stream.drain(memory, items, loaded)

  def consume(n):
    mine = stream.product_slice(
      grid.member() * stream.ROWS + n * stream.PRODUCT_ROWS
    )

    def sum_item(step, carry):
      row, consumed = carry
      row, sequence, row_block, part, key_blocks = place(step, row)
      start, end = (
        plgpu.load(
          ref.at[sequence, row_block, mine],
          layout=stream.PER_ROW,
          optimized=False,
        )
        for ref in (start_ref, end_ref)
      )
      plgpu.barrier_wait(memory.barriers.resident_full)

      def add_keys(key_block, carry):
        top, total, consumed = carry
        logits, consumed = stream.products(
          memory, n, consumed, resident_is_rows=True
        )
        keys = stream.key_numbers(key_begin(key_block))
        # The last block repeats keys of the one before.
        begin = jnp.maximum(start, key_block * stream.ROWS)
        is_visible = keys >= stream.spread(begin, 0)
        is_visible &= keys < stream.spread(end, 0)
        # Selected, not added: an unseen key may hold NaN.
        logits = jnp.where(is_visible, logits * scale, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        # -inf of a row without keys would make NaN of its differences.
        shift = jnp.where(new_top > -jnp.inf, new_top, 0.0)
        powers = jnp.exp2(logits - stream.spread(shift, 0))
        total = total * jnp.exp2(top - shift) + jnp.sum(powers, axis=1)
        return new_top, total, consumed

      def per_row(value):
        return plgpu.layout_cast(
          jnp.full((stream.PRODUCT_ROWS,), value, jnp.float32), stream.PER_ROW
        )

      top, total, consumed = lax.fori_loop(
        *key_blocks, add_keys, (per_row(-jnp.inf), per_row(0.0), consumed)
      )
      plgpu.barrier_arrive(memory.barriers.resident_free)
      begin = row_begin(row_block) + n * stream.PRODUCT_ROWS
      target = out_ref.at[sequence, part, stream.product_slice(begin)]
      target[...] = top + jnp.log2(total)
      return row, consumed

    lax.fori_loop(0, items, sum_item, (jnp.int32(0), jnp.int32(0)))

  stream.run_warpgroups(produce, consume)
