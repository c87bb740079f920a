# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Mean attention probabilities on Hopper, from the saved log-sum-exp.

A kernel of its own, so that XLA drops it where nobody reads its result. Keys
are the rows of its products: a sum over heads then stays within four threads.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.hopper import copies
from pallas_kernels.sparse_attention import mosaic_gpu_forward_items as items
from pallas_kernels.sparse_attention.quantization import QuantizedLatents

ROWS = items.ROWS
TILE = items.TILE

_BY_KEY = plgpu.Layout.WGMMA.reduce(1)
_BY_HEAD = plgpu.Layout.WGMMA.reduce(0)
# Name of a barrier between the two multiplying warpgroups.
_QUERY_READ = 8


def call(
  problem: items.Problem,
  query: BFloat16[Array, "F N C"],
  table: BFloat16[Array, "BS C"] | QuantizedLatents,
  indices: Int32[Array, "F K"],
  log_sum_exp: Float32[Array, "F N"],
) -> Float32[Array, "tiles F K"]:
  """Runs the kernel.

  Args:
    problem: its sizes; without splits.
    query: all batches' queries.
    table: all batches' rows.
    indices: of rows of a query's own batch, -1 for none.
    log_sum_exp: of the scaled logits.

  Returns:
    Sums of the probabilities over each tile's heads; 0 at index -1.
  """
  shape = (problem.head_tiles, problem.flat_queries, problem.count)

  def sparse_mla_mean_probs(*refs):
    _body(problem, *refs)

  return plgpu.kernel(
    sparse_mla_mean_probs,
    out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
    scratch_types=(
      items.heads_scratch(problem, problem.heads),
      plgpu.Barrier(num_arrivals=problem.column_tiles),
      *items.rows_scratch(problem),
    ),
    grid=(problem.blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="warpgroup",
    compiler_params=items.compiler_params(),
  )(query, table, indices, _by_tile(problem, log_sum_exp))


def _by_tile(problem, log_sum_exp):
  """In units of log 2; inf, so probability 0, behind the heads."""
  missing = problem.head_tiles * problem.heads - log_sum_exp.shape[1]
  return jnp.pad(
    log_sum_exp * math.log2(math.e),
    ((0, 0), (0, missing)),
    constant_values=jnp.inf,
  )


@dataclasses.dataclass(frozen=True)
class _Refs:
  """The kernel's arrays.

  Attributes:
    query: `[F, N, C]`.
    table: `[B S, C]`, or its three arrays.
    indices: `[F, K]`.
    log_sum_exp: `[F, tiles x heads]`, in units of log 2.
    out: `[tiles, F, K]`.
    heads: the query's.
    query_full: a query's tiles have arrived.
    rows: of a step.
  """

  query: jax.Ref
  table: jax.Ref | QuantizedLatents
  indices: jax.Ref
  log_sum_exp: jax.Ref
  out: jax.Ref
  heads: items.HeadTiles
  query_full: jax.Ref
  rows: items.Rows


def _body(problem, *arrays):
  *arrays, rows, words, free_first, free_rest = arrays
  *outer, heads, query_full = arrays
  refs = _Refs(
    *outer,
    items.head_tiles(heads),
    query_full,
    items.Rows(rows, words, (free_first, free_rest)),
  )

  def multiply(half):
    if half == 0:
      _load_query(problem, refs, items.first_item())
    items.for_each_item(
      problem, functools.partial(_sum_item, problem, refs, half)
    )

  selection = items.Selection(refs.indices)
  items.run_block(problem, refs.table, selection, refs.rows, multiply)


def _load_query(problem, refs, item):
  place = items.place(problem, item)
  for tile in range(problem.column_tiles):
    refs.heads.load(refs.query, place, tile, refs.query_full)


def _sum_item(problem, refs, half, item, step):
  """One item of one multiplying warpgroup; returns the steps so far."""
  place = items.place(problem, item)
  plgpu.barrier_wait(refs.query_full)
  heads = pl.ds(place.head_tile * problem.heads, problem.heads)
  log_sum_exp = plgpu.load(
    refs.log_sum_exp.at[place.query, heads], layout=_BY_HEAD, optimized=False
  )

  def run(i, step):
    logits, index = _logits(problem, refs, half, step)
    probs = jnp.exp2(
      logits - lax.broadcast_in_dim(log_sum_exp, logits.shape, [1])
    )
    first = i * items.STEP_KEYS + half * ROWS
    refs.out.at[place.head_tile, place.query, pl.ds(first, ROWS)][...] = (
      jnp.where(index >= 0, probs.sum(axis=1), 0.0)
    )
    return step + 1

  step = lax.fori_loop(jnp.int32(0), place.steps, run, step)
  copies.synchronize(_QUERY_READ, 2)
  if half == 0:
    next_item = item + problem.blocks

    @pl.when(next_item < problem.items)
    def _():
      _load_query(problem, refs, next_item)

  return step


def _logits(problem, refs, half, step):
  """A half's logits `[keys, heads]` in units of log 2, and its indices."""
  for part in range(2):
    refs.rows.wait(half, part, step)

  def multiply(accumulator):
    slot = copies.opaque(half)
    for tile in range(problem.column_tiles):
      plgpu.wgmma(
        accumulator,
        refs.rows.rows.at[slot, :, pl.ds(TILE * tile, TILE)],
        refs.heads.tiles.at[tile].transpose((1, 0)),
      )
    return accumulator[...], refs.rows.indices(half, _BY_KEY)

  logits, index = pl.run_scoped(
    multiply, plgpu.ACC((ROWS, problem.heads), jnp.float32)
  )
  for part in range(2):
    refs.rows.release(half=half, part=part, arrivals=2)
  return logits * (problem.scale * math.log2(math.e)), index
