# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The indexer's scores on Hopper: many queries against many keys.

A persistent grid walks over the visible tiles. In a tile each consumer
warpgroup owns a block of keys, which stays in shared memory while the queries
stream past head by head: one product of 64 queries, then ReLU, weight and sum
in registers. A producer warpgroup fills the ring of queries; the thread blocks
of a cluster have neighbouring keys and share it.
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
QUERIES = 64
_LAYOUT = plgpu.Layout.WGMMA
_PER_QUERY, _PER_KEY = _LAYOUT.reduce(1), _LAYOUT.reduce(0)
# Three consumers and a producer start with 128 registers a thread.
_REGISTERS_OF_CONSUMER, _REGISTERS_OF_PRODUCER = 160, 24


class Tiles(NamedTuple):
  """Sizes of a tile.

  Attributes:
    warpgroups: consumers of a thread block.
    keys: of one consumer.
    stages: of the ring of queries, a power of two.
    members: thread blocks of a cluster.
  """

  warpgroups: int
  keys: int
  stages: int
  members: int

  @property
  def block_width(self) -> int:
    """Keys of a thread block."""
    return self.warpgroups * self.keys

  @property
  def width(self) -> int:
    """Keys of a tile: a cluster's."""
    return self.members * self.block_width


class _Barriers(NamedTuple):
  """Of the ring, and of each consumer's keys."""

  queries_full: object
  queries_free: object
  keys_full: object
  keys_free: object


class _Tile(NamedTuple):
  """Where a thread block's part of a tile begins."""

  sequence: jax.Array
  query_block: jax.Array
  query: jax.Array
  key: jax.Array


def scores(
  index_q,
  index_k,
  weights,
  key_start,
  key_end,
  key_scale,
  schedule: schedule_lib.Schedule,
  *,
  num_keys: int,
  tiles: Tiles,
  num_blocks: int,
):
  """Scores of T queries and S keys.

  Args:
    index_q: queries `[B, T, I, D]`, T a multiple of 8 and at least 64.
    index_k: keys `[B, any, D]`, a multiple of 8, at least a tile; read as
      0 behind them.
    weights: by block of queries `[B, blocks, I, 64]`. The last block begins at
      T - 64.
    key_start: first visible key, by block `[B, blocks, 64]`.
    key_end: one past the last.
    key_scale: float32 factors `[B, S]`, or None.
    schedule: the tiles to compute and to fill.
    num_keys: S, a multiple of 8 and at least a tile.
    tiles: sizes.
    num_blocks: thread blocks that run together.

  Returns:
    float32 `[B, T, S]`; what is neither visible nor filled is undefined.
  """
  batch, num_queries, heads, dim = index_q.shape
  operands = [index_q, index_k, weights, key_start, key_end, *schedule]
  if key_scale is not None:
    operands.append(key_scale)
  clusters = num_blocks // tiles.members
  cluster = {"cluster": (tiles.members,), "cluster_names": ("member",)}
  return plgpu.kernel(
    functools.partial(_kernel, tiles=tiles, clusters=clusters, heads=heads),
    out_type=jax.ShapeDtypeStruct((batch, num_queries, num_keys), jnp.float32),
    scratch_types=_scratch(tiles, dim, index_q.dtype),
    grid=(clusters,),
    grid_names=("cluster",),
    **(cluster if tiles.members > 1 else {}),
    num_threads=tiles.warpgroups + 1,
    thread_name="warpgroup",
    kernel_name="indexer_scores",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      approx_math=True,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
    ),
  )(*operands)


def _scratch(tiles: Tiles, dim: int, dtype):
  swizzle = min(dim * dtype.itemsize, 128)
  transforms = (
    plgpu.TilingTransform((8, swizzle // dtype.itemsize)),
    plgpu.SwizzleTransform(swizzle),
  )

  def rows(*shape):
    return plgpu.SMEM((*shape, dim), dtype, transforms=transforms)

  free = {"num_arrivals": tiles.warpgroups, "num_barriers": tiles.stages}
  return {
    "queries_ref": rows(tiles.stages, QUERIES),
    "keys_ref": rows(tiles.warpgroups, tiles.keys),
    "barriers": _Barriers(
      queries_full=plgpu.Barrier(num_barriers=tiles.stages),
      # The consumers of a whole cluster free a stage for all its producers.
      queries_free=plgpu.ClusterBarrier(collective_axes=("member",), **free)
      if tiles.members > 1
      else plgpu.Barrier(**free),
      keys_full=plgpu.Barrier(num_barriers=tiles.warpgroups),
      keys_free=plgpu.Barrier(num_barriers=tiles.warpgroups),
    ),
  }


def _kernel(
  q_ref, k_ref, weights_ref, start_ref, end_ref, first_ref, offset_ref,
  fill_ref, *refs, queries_ref, keys_ref, barriers, tiles, clusters, heads,
):  # fmt: skip
  scale_ref, out_ref = (None, *refs)[-2:]
  query_blocks = weights_ref.shape[1]
  num_queries, num_keys = out_ref.shape[1:]
  schedule = schedule_lib.Schedule(first_ref, offset_ref, fill_ref)
  cluster, warpgroup = lax.axis_index("cluster"), lax.axis_index("warpgroup")
  member = lax.axis_index("member") if tiles.members > 1 else 0
  count = schedule_lib.strided_count(offset_ref, cluster, clusters)
  # Of tiles' rows and of heads that passed through the ring.
  nothing = jnp.int32(0), jnp.int32(0)

  def place(find_block, step, row):
    """The row and place of a tile: neighbours run at once, on one row."""
    row, column = find_block(schedule, cluster + step * clusters, row)
    query_block = lax.rem(row, jnp.int32(query_blocks))
    return row, _Tile(
      sequence=lax.div(row, jnp.int32(query_blocks)),
      query_block=query_block,
      query=schedule_lib.tile_begin(query_block, QUERIES, num_queries),
      key=schedule_lib.tile_begin(column, tiles.width, num_keys)
      + member * tiles.block_width,
    )

  def ring_slot(n):
    return n & (tiles.stages - 1)

  def produce():
    def load_tile(step, carry):
      row, loaded = carry
      row, tile = place(schedule_lib.visible_block, step, row)
      for n in range(tiles.warpgroups):

        @pl.when(step > 0)
        def _(n=n):
          plgpu.barrier_wait(barriers.keys_free.at[n])

        plgpu.copy_gmem_to_smem(
          k_ref.at[tile.sequence, pl.ds(tile.key + n * tiles.keys, tiles.keys)],
          keys_ref.at[n],
          barriers.keys_full.at[n],
        )

      def load_head(head, loaded):
        slot = ring_slot(loaded)

        @pl.when(loaded >= tiles.stages)
        def _():
          plgpu.barrier_wait(barriers.queries_free.at[slot])

        plgpu.copy_gmem_to_smem(
          q_ref.at[tile.sequence, pl.ds(tile.query, QUERIES), head],
          queries_ref.at[slot],
          barriers.queries_full.at[slot],
          collective_axes="member" if tiles.members > 1 else None,
        )
        return loaded + 1

      return row, lax.fori_loop(0, heads, load_head, loaded)

    _, loaded = lax.fori_loop(0, count, load_tile, nothing)

    # A cluster's memory must outlive what its other members do to it, and the
    # interpreter wants every completed phase to have been waited for.
    @pl.loop(jnp.maximum(loaded - tiles.stages, 0), loaded)
    def _(n):
      plgpu.barrier_wait(barriers.queries_free.at[ring_slot(n)])

    for n in range(tiles.warpgroups):

      @pl.when(count > 0)
      def _(n=n):
        plgpu.barrier_wait(barriers.keys_free.at[n])

  def consume(n):
    shape = (QUERIES, tiles.keys)

    def per_query(ref):
      return plgpu.load(ref, layout=_PER_QUERY, optimized=False)

    def target(tile):
      keys = pl.ds(tile.key + n * tiles.keys, tiles.keys)
      return out_ref.at[tile.sequence, pl.ds(tile.query, QUERIES), keys]

    def multiply(slot, products_ref):
      plgpu.wgmma(
        products_ref, queries_ref.at[slot], keys_ref.at[n].transpose((1, 0))
      )
      return products_ref[...]

    def sum_heads(tile, consumed):
      def add_head(head, carry):
        sums, consumed = carry
        # Before the product, which hides its latency; and not through the
        # ring, whose reuse would need a fence of each head.
        weights = per_query(
          weights_ref.at[tile.sequence, tile.query_block, head]
        )
        slot = ring_slot(consumed)
        plgpu.barrier_wait(barriers.queries_full.at[slot])
        products = pl.run_scoped(
          functools.partial(multiply, slot), plgpu.ACC(shape, jnp.float32)
        )
        plgpu.barrier_arrive(barriers.queries_free.at[slot])
        weights = lax.broadcast_in_dim(weights, shape, (0,))
        return sums + jnp.maximum(products, 0.0) * weights, consumed + 1

      zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _LAYOUT)
      return lax.fori_loop(0, heads, add_head, (zeros, consumed))

    def score_tile(step, carry):
      row, consumed = carry
      row, tile = place(schedule_lib.visible_block, step, row)
      start, end = (
        per_query(ref.at[tile.sequence, tile.query_block])
        for ref in (start_ref, end_ref)
      )
      plgpu.barrier_wait(barriers.keys_full.at[n])
      sums, consumed = sum_heads(tile, consumed)
      plgpu.barrier_arrive(barriers.keys_free.at[n])
      key = tile.key + n * tiles.keys
      if scale_ref is not None:
        scale = plgpu.load(
          scale_ref.at[tile.sequence, pl.ds(key, tiles.keys)],
          layout=_PER_KEY,
          optimized=False,
        )
        sums = sums * lax.broadcast_in_dim(scale, shape, (1,))
      keys = key + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_LAYOUT)
      start, end = (lax.broadcast_in_dim(x, shape, (0,)) for x in (start, end))
      is_visible = (keys >= start) & (keys < end)
      # Selected, not multiplied: an unseen key may hold NaN.
      target(tile)[...] = jnp.where(is_visible, sums, -jnp.inf)
      return row, consumed

    lax.fori_loop(0, count, score_tile, nothing)

    def fill_tile(step, row):
      row, tile = place(schedule_lib.unseen_block, step, row)
      target(tile)[...] = plgpu.layout_cast(
        jnp.full(shape, -jnp.inf, jnp.float32), _LAYOUT
      )
      return row

    fills = schedule_lib.strided_count(fill_ref, cluster, clusters)
    lax.fori_loop(0, fills, fill_tile, jnp.int32(0))

  @pl.when(warpgroup == tiles.warpgroups)
  def _():
    plgpu.set_max_registers(_REGISTERS_OF_PRODUCER, action="decrease")
    produce()

  for n in range(tiles.warpgroups):

    @pl.when(warpgroup == n)
    def _(n=n):
      plgpu.set_max_registers(_REGISTERS_OF_CONSUMER, action="increase")
      consume(n)
