# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The second pass: probabilities averaged over the heads.

A thread block keeps 128 keys while 128 queries stream past, head by head; the
sum over heads stays in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from pallas_kernels.dense_attention import mosaic_gpu_stream as stream
from pallas_kernels.indexer import mosaic_gpu_schedule as schedule_lib


def mean_probs(
  query,
  kv_latent,
  log2_sums,
  key_start,
  key_end,
  schedule: schedule_lib.Schedule,
  *,
  scale: float,
  grid: stream.Grid,
) -> Float32[Array, "B T S"]:
  """Means over heads of 2 ** (scale * logit - log2_sum).

  Args:
    query: queries `[B, T, N, C]`, T a multiple of 8, at least 128.
    kv_latent: latents `[B, S, C]`, S a multiple of 8, at least a block: the
      keys of a cluster.
    log2_sums: by block of queries `[B, blocks, N, 128]`; the last block ends
      with the queries.
    key_start: first visible key, by block `[B, blocks, 128]`.
    key_end: one past the last.
    schedule: blocks of keys seen by the blocks of queries, and those filled
      with 0.
    scale: factor on the logits.
    grid: thread blocks.
  """
  batch, num_queries, _, width = query.shape
  return stream.call(
    functools.partial(_kernel, scale=scale, grid=grid),
    jax.ShapeDtypeStruct((batch, num_queries, kv_latent.shape[1]), jnp.float32),
    (query, kv_latent, log2_sums, key_start, key_end, *schedule),
    width=width,
    dtype=query.dtype,
    grid=grid,
  )


def _kernel(
  query_ref, keys_ref, sums_ref, start_ref, end_ref, first_ref, offset_ref,
  fill_ref, out_ref, *, memory, scale, grid,
):  # fmt: skip
  cluster = lax.axis_index("cluster")
  _, query_blocks, heads, _ = sums_ref.shape
  num_queries, num_keys = out_ref.shape[1:]
  schedule = schedule_lib.Schedule(first_ref, offset_ref, fill_ref)
  items = schedule_lib.strided_count(offset_ref, cluster, grid.clusters)

  def place(find, step, row):
    """Sequence, block of queries, first query and first key of a tile."""
    row, key_block = find(schedule, cluster + step * grid.clusters, row)
    sequence = lax.div(row, jnp.int32(query_blocks))
    query_block = lax.rem(row, jnp.int32(query_blocks))
    query = schedule_lib.tile_begin(query_block, stream.ROWS, num_queries)
    key = schedule_lib.tile_begin(key_block, grid.rows, num_keys)
    key += grid.member() * stream.ROWS
    return row, sequence, query_block, query, key

  def target(sequence, n, query, key):
    mine = stream.product_slice(query + n * stream.PRODUCT_ROWS)
    return out_ref.at[sequence, mine, stream.row_slice(key)]

  def produce():
    def load_tile(step, carry):
      row, loaded = carry
      row, sequence, _, query, key = place(
        schedule_lib.visible_block, step, row
      )
      stream.load_resident(
        memory, stream.rows_of(keys_ref, sequence, key), step
      )

      def load_head(head, loaded):
        source = stream.rows_of(query_ref, sequence, query, head)
        return stream.load_stream(memory, source, loaded, grid)

      return row, lax.fori_loop(0, heads, load_head, loaded)

    _, loaded = lax.fori_loop(0, items, load_tile, (jnp.int32(0), jnp.int32(0)))
    stream.drain(memory, items, loaded)

  def consume(n):
    mine = stream.product_rows(n)

    def per_query(ref):
      return plgpu.load(ref, layout=stream.PER_ROW, optimized=False)

    def add_tile(step, carry):
      row, consumed = carry
      row, sequence, query_block, query, key = place(
        schedule_lib.visible_block, step, row
      )
      start, end = (
        per_query(ref.at[sequence, query_block, mine])
        for ref in (start_ref, end_ref)
      )
      plgpu.barrier_wait(memory.barriers.resident_full)

      def add_head(head, carry):
        probs, consumed = carry
        log2_sum = per_query(sums_ref.at[sequence, query_block, head, mine])
        logits, consumed = stream.products(
          memory, n, consumed, resident_is_rows=False
        )
        logits = logits * scale - stream.spread(log2_sum, 0)
        return probs + jnp.exp2(logits), consumed

      probs, consumed = lax.fori_loop(
        0, heads, add_head, (stream.zeros(), consumed)
      )
      plgpu.barrier_arrive(memory.barriers.resident_free)
      keys = stream.key_numbers(key)
      is_visible = keys >= stream.spread(start, 0)
      is_visible &= keys < stream.spread(end, 0)
      # Selected, not multiplied: an unseen key may hold NaN.
      target(sequence, n, query, key)[...] = jnp.where(
        is_visible, probs * (1 / heads), 0.0
      )
      return row, consumed

    lax.fori_loop(0, items, add_tile, (jnp.int32(0), jnp.int32(0)))

    def fill_tile(step, row):
      row, sequence, _, query, key = place(schedule_lib.unseen_block, step, row)
      target(sequence, n, query, key)[...] = stream.zeros()
      return row

    fills = schedule_lib.strided_count(fill_ref, cluster, grid.clusters)
    lax.fori_loop(0, fills, fill_tile, jnp.int32(0))

  stream.run_warpgroups(produce, consume)
