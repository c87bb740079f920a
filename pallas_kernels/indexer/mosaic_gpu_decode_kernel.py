# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The indexer's scores on Hopper: few queries, as in decoding.

Bound by reading the keys once. They are the rows of the products and the heads
of a query their columns, so that the sum over heads stays within four threads
and no row is empty. Each thread block streams a run of keys through a ring.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.indexer import mosaic_gpu_schedule as schedule_lib

# Rows of one matrix instruction.
_ROWS = 64
_LAYOUT = plgpu.Layout.WGMMA
_PER_KEY, _PER_HEAD = _LAYOUT.reduce(1), _LAYOUT.reduce(0)


class Tiles(NamedTuple):
  """Sizes of a tile.

  Attributes:
    warpgroups: consumers, of 64 keys each.
    stages: of the ring of keys.
  """

  warpgroups: int
  stages: int

  @property
  def width(self) -> int:
    """Keys of a tile."""
    return self.warpgroups * _ROWS


class _Barriers(NamedTuple):
  queries_full: object
  queries_free: object
  keys_full: object
  keys_free: object


def scores(
  index_q,
  index_k,
  index_weights,
  key_start,
  key_end,
  key_scale,
  schedule: schedule_lib.Schedule,
  *,
  num_keys: int,
  tiles: Tiles,
  num_blocks: int,
):
  """Scores of `[B, T, I, D]` queries; T x I at most 256, I a multiple of 8.

  Args:
    index_q: queries.
    index_k: keys `[B, any, D]`, a multiple of 8, at least a tile; read as
      0 behind them.
    index_weights: head weights `[B, T, I]`.
    key_start: first visible key `[B, T]`.
    key_end: one past the last.
    key_scale: float32 factors `[B, S]`, or None.
    schedule: of one row a sequence.
    num_keys: S, a multiple of 8 and at least a tile.
    tiles: sizes.
    num_blocks: of the grid.

  Returns:
    float32 `[B, T, S]`; what is neither visible nor filled is undefined.
  """
  batch, num_queries, heads, dim = index_q.shape
  operands = [index_q, index_k, index_weights, key_start, key_end, *schedule]
  if key_scale is not None:
    operands.append(key_scale)
  return plgpu.kernel(
    functools.partial(_kernel, tiles=tiles, num_blocks=num_blocks),
    out_type=jax.ShapeDtypeStruct((batch, num_queries, num_keys), jnp.float32),
    scratch_types=_scratch(tiles, (num_queries, heads), dim, index_q.dtype),
    grid=(num_blocks,),
    grid_names=("block",),
    num_threads=tiles.warpgroups + 1,
    thread_name="warpgroup",
    kernel_name="indexer_scores_few_queries",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      approx_math=True,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
    ),
  )(*operands)


def _scratch(tiles: Tiles, queries: tuple[int, int], dim: int, dtype):
  swizzle = min(dim * dtype.itemsize, 128)
  transforms = (
    plgpu.TilingTransform((8, swizzle // dtype.itemsize)),
    plgpu.SwizzleTransform(swizzle),
  )

  def rows(*shape):
    return plgpu.SMEM((*shape, dim), dtype, transforms=transforms)

  return {
    "queries_ref": rows(*queries),
    "keys_ref": rows(tiles.stages, tiles.width),
    "barriers": _Barriers(
      queries_full=plgpu.Barrier(num_arrivals=queries[0]),
      queries_free=plgpu.Barrier(num_arrivals=tiles.warpgroups),
      keys_full=plgpu.Barrier(num_barriers=tiles.stages),
      keys_free=plgpu.Barrier(
        num_arrivals=tiles.warpgroups, num_barriers=tiles.stages
      ),
    ),
  }


def _kernel(
  q_ref, k_ref, weights_ref, start_ref, end_ref, first_ref, offset_ref,
  fill_ref, *refs, queries_ref, keys_ref, barriers, tiles, num_blocks,
):  # fmt: skip
  scale_ref, out_ref = (None, *refs)[-2:]
  _, num_queries, num_keys = out_ref.shape
  schedule = schedule_lib.Schedule(first_ref, offset_ref, fill_ref)
  block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
  begin, end = schedule_lib.share(offset_ref, block, num_blocks)
  # Before the first tile, whose queries are yet to be loaded.
  no_row = jnp.int32(-1)

  def place(find_block, item, row):
    """The row and first key of a tile."""
    row, column = find_block(schedule, item, jnp.maximum(row, 0))
    return row, schedule_lib.tile_begin(column, tiles.width, num_keys)

  def ring_slot(item):
    return lax.rem(item - begin, jnp.int32(tiles.stages))

  def produce():
    def load_tile(item, previous):
      row, key = place(schedule_lib.visible_block, item, previous)

      @pl.when(row != previous)
      def _():
        @pl.when(previous >= 0)
        def _():
          plgpu.barrier_wait(barriers.queries_free)

        @pl.loop(0, num_queries)
        def _(query):
          plgpu.copy_gmem_to_smem(
            q_ref.at[row, query], queries_ref.at[query], barriers.queries_full
          )

      slot = ring_slot(item)

      @pl.when(item - begin >= tiles.stages)
      def _():
        plgpu.barrier_wait(barriers.keys_free.at[slot])

      plgpu.copy_gmem_to_smem(
        k_ref.at[row, pl.ds(key, tiles.width)],
        keys_ref.at[slot],
        barriers.keys_full.at[slot],
      )
      return row

    lax.fori_loop(begin, end, load_tile, no_row)

    # The interpreter wants every completed phase to have been waited for.
    @pl.loop(jnp.maximum(end - tiles.stages, begin), end)
    def _(item):
      plgpu.barrier_wait(barriers.keys_free.at[ring_slot(item)])

    @pl.when(end > begin)
    def _():
      plgpu.barrier_wait(barriers.queries_free)

  def consume(n):
    def multiply(slot, query, products_ref):
      plgpu.wgmma(
        products_ref,
        keys_ref.at[slot, pl.ds(n * _ROWS, _ROWS)],
        queries_ref.at[query].transpose((1, 0)),
      )
      return products_ref[...]

    def sum_heads(slot, row, query):
      shape = (_ROWS, queries_ref.shape[1])
      # Before the product, which hides its latency.
      weights = plgpu.load(
        weights_ref.at[row, query], layout=_PER_HEAD, optimized=False
      )
      products = pl.run_scoped(
        functools.partial(multiply, slot, query), plgpu.ACC(shape, jnp.float32)
      )
      weights = lax.broadcast_in_dim(weights, shape, (1,))
      return jnp.sum(jnp.maximum(products, 0.0) * weights, axis=1)

    def score_tile(item, previous):
      row, key = place(schedule_lib.visible_block, item, previous)

      @pl.when(row != previous)
      def _():
        @pl.when(previous >= 0)
        def _():
          plgpu.barrier_arrive(barriers.queries_free)

        plgpu.barrier_wait(barriers.queries_full)

      slot = ring_slot(item)
      plgpu.barrier_wait(barriers.keys_full.at[slot])
      mine = pl.ds(key + n * _ROWS, _ROWS)
      keys = mine.start + plgpu.broadcasted_iota(
        jnp.int32, (_ROWS,), 0, layout=_PER_KEY
      )

      @pl.loop(0, num_queries)
      def _(query):
        sums = sum_heads(slot, row, query)
        if scale_ref is not None:
          sums = sums * plgpu.load(
            scale_ref.at[row, mine], layout=_PER_KEY, optimized=False
          )
        is_visible = keys >= start_ref[row, query]
        is_visible &= keys < end_ref[row, query]
        # Selected, not multiplied: an unseen key may hold NaN.
        out_ref[row, query, mine] = jnp.where(is_visible, sums, -jnp.inf)

      plgpu.barrier_arrive(barriers.keys_free.at[slot])
      return row

    lax.fori_loop(begin, end, score_tile, no_row)

    @pl.when(end > begin)
    def _():
      plgpu.barrier_arrive(barriers.queries_free)

    def fill_tile(item, row):
      row, key = place(schedule_lib.unseen_block, item, row)

      @pl.loop(0, num_queries)
      def _(query):
        out_ref[row, query, pl.ds(key + n * _ROWS, _ROWS)] = plgpu.layout_cast(
          jnp.full((_ROWS,), -jnp.inf, jnp.float32), _PER_KEY
        )

      return row

    fills = schedule_lib.share(fill_ref, block, num_blocks)
    lax.fori_loop(*fills, fill_tile, jnp.int32(0))

  @pl.when(warpgroup == tiles.warpgroups)
  def _():
    produce()

  for n in range(tiles.warpgroups):
    pl.when(warpgroup == n)(functools.partial(consume, n))
