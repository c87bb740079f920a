# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of sparse MLA on Hopper: one pass over each query's rows.

An item is a query and up to 64 of its heads. A block of threads takes an item
at a time, and its rows 64 at a time. With S = Q K', P = exp(S - L), the four
warpgroups are
  scores: S and P; the first columns of dQ += dS K;
  probs:  dP = dO V' and dS = P (dP - delta); the middle columns of dQ;
  rows:   dK = dS' Q + P' dO, stored for `hopper.row_sums`; the other columns
          of dQ;
  copies: the next 64 rows, the next item.
Q, dO and 64 rows of K fill the shared memory (213 of 227 KiB): the next rows
come when dQ has used the last ones, while the rows of dK are still made.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import copies, reductions, row_sums

# Of the wgmma instruction: heads, and rows of a step.
TILE = 64
_SCORES, _PROBS, _ROWS, _COPIES = range(4)
_CONSUMERS = 3
# Four warpgroups start at 128 registers a thread. ptxas spills at most other
# divisions of their sum.
_REGISTERS = {_SCORES: 192, _PROBS: 192, _ROWS: 104, _COPIES: 24}
_START_REGISTERS = 128
# A warpgroup's columns of dQ, 128 registers a thread, and those of one
# accumulator: ptxas refuses 256 columns where the start is 128 registers.
_MAX_COLUMN_TILES, _ACCUMULATOR_TILES = 4, 2
# Rows arrive in parts of their columns, and products begin with the first.
_PART_TILES = 3
_LAYOUT = plgpu.Layout.WGMMA
# Of an array by row of `_LAYOUT`: by head for S and dP, by row for dK.
_BY_ROW = _LAYOUT.reduce(1)


class Problem(NamedTuple):
  """Static facts of a call.

  Attributes:
    sizes: of the sum over items.
    head_tiles: items of a query.
    heads: of an item, a multiple of 8 up to 64.
    value_dim: leading columns of a row that are the value.
    scale: of the logits.
  """

  sizes: row_sums.Sizes
  head_tiles: int
  heads: int
  value_dim: int
  scale: float

  @property
  def column_tiles(self) -> int:
    """Of a row."""
    return self.sizes.width // TILE

  @property
  def value_tiles(self) -> int:
    """Of a value."""
    return self.value_dim // TILE

  @property
  def dq_tiles(self) -> tuple[tuple[int, int], ...]:
    """First and last (exclusive) column tile of dQ, by warpgroup."""
    left = max(0, self.column_tiles - 2 * _MAX_COLUMN_TILES)
    end = self.column_tiles - left
    middle = -(-end // 2)
    return ((0, middle), (middle, end), (end, self.column_tiles))

  @property
  def parts(self) -> tuple[tuple[int, int], ...]:
    """First and last (exclusive) column tile of rows that arrive together."""
    starts = range(0, self.column_tiles, _PART_TILES)
    return tuple((j, min(j + _PART_TILES, self.column_tiles)) for j in starts)

  @property
  def k_readers(self) -> int:
    """Warpgroups with columns of dQ."""
    return sum(first < last for first, last in self.dq_tiles)


class _Refs(NamedTuple):
  """Global memory, shared memory and barriers.

  Attributes:
    bounds: as `row_sums.Chunk.bounds`.
    query: bfloat16 [items, heads, width].
    grad_out: bfloat16 [items, heads, value_dim].
    table: bfloat16 [rows, width].
    indices: int32 [queries, rows_an_item].
    log_sum_exp: float32 [items, TILE], times log2(e).
    delta: float32 [items, TILE].
    grad_query: like `query`.
    bits: as `row_sums.Chunk.bits`.
    addends: as `row_sums.Chunk.addends`.
    places: as `row_sums.Chunk.places`.
    q: the item's queries, by column tile.
    do: the item's `grad_out`, by column tile.
    k: 64 rows of `table`.
    p: P of those, [heads, rows].
    ds: dS, likewise.
    words: barriers of `copies`, one for each part of `k`.
    item_full: `q` and `do` are there.
    item_done: no product reads `q` any more.
    item_free: nothing reads `q` and `do`.
    k_free: nothing reads `k`.
    p_full: `p` is there.
    ds_full: `ds` is there.
    p_free: dK is made of `p` and `ds`.
  """

  bounds: jax.Ref
  query: jax.Ref
  grad_out: jax.Ref
  table: jax.Ref
  indices: jax.Ref
  log_sum_exp: jax.Ref
  delta: jax.Ref
  grad_query: jax.Ref
  bits: jax.Ref
  addends: jax.Ref
  places: jax.Ref
  q: jax.Ref
  do: jax.Ref
  k: jax.Ref
  p: jax.Ref
  ds: jax.Ref
  words: jax.Ref
  item_full: jax.Ref
  item_done: jax.Ref
  item_free: jax.Ref
  k_free: jax.Ref
  p_full: jax.Ref
  ds_full: jax.Ref
  p_free: jax.Ref

  @property
  def chunk(self) -> row_sums.Chunk:
    return row_sums.Chunk(self.bounds, self.bits, self.addends, self.places)


def call(
  problem: Problem,
  bounds: jax.Array,
  query: jax.Array,
  grad_out: jax.Array,
  table: jax.Array,
  indices: jax.Array,
  log_sum_exp: jax.Array,
  delta: jax.Array,
  grad_query: jax.Ref,
  bits: jax.Ref,
) -> tuple[jax.Array, jax.Array]:
  """Writes the chunk's rows of `grad_query`; returns its addends to dK.

  The arguments are as in `_Refs`.
  """
  tiles = (problem.column_tiles, problem.value_tiles)
  kernel = plgpu.kernel(
    functools.partial(_body, problem),
    out_type=problem.sizes.out_type,
    scratch_types=[
      *(_tiled((1, count, TILE, TILE)) for count in tiles),
      _tiled((1, TILE, problem.sizes.width)),
      _tiled((1, TILE, TILE)),
      _tiled((1, TILE, TILE)),
      plgpu.SMEM((len(problem.parts) * copies.BARRIER_WORDS,), jnp.int32),
      plgpu.Barrier(num_arrivals=sum(tiles)),
      plgpu.Barrier(num_arrivals=_CONSUMERS),
      plgpu.Barrier(num_arrivals=_CONSUMERS),
      plgpu.Barrier(num_arrivals=problem.k_readers),
      plgpu.Barrier(),
      plgpu.Barrier(),
      plgpu.Barrier(),
    ],
    grid=(problem.sizes.num_blocks,),
    grid_names=("block",),
    num_threads=len(_REGISTERS),
    thread_name="warpgroup",
    kernel_name="sparse_mla_backward",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      approx_math=True,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
    ),
  )
  return kernel(
    bounds,
    query,
    grad_out,
    table,
    indices,
    log_sum_exp,
    delta,
    grad_query,
    bits,
  )


def _tiled(shape):
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=copies.TRANSFORMS)


def _body(problem, *refs):
  refs = _Refs(*refs)
  if problem.heads < TILE:
    _zero_queries(problem, refs)
  arrivals = [copies.WARPGROUP] * len(problem.parts)
  copies.initialize_barriers(refs.words, arrivals)
  warpgroup = lax.axis_index("warpgroup")
  for number, role in enumerate((_scores, _probs, _rows, _copies)):

    @pl.when(warpgroup == number)
    def _(number=number, role=role):
      registers = _REGISTERS[number]
      plgpu.set_max_registers(
        registers,
        action="increase" if registers > _START_REGISTERS else "decrease",
      )
      role(problem, refs)


def _zero_queries(problem, refs):
  """Zeroes the heads that no copy will fill, all warpgroups the same."""

  def zero_tile(operand, j):
    operand.at[0, j][...] = plgpu.layout_cast(
      jnp.zeros((TILE, TILE), jnp.bfloat16), _LAYOUT
    )

  for operand, tiles in (
    (refs.q, problem.column_tiles),
    (refs.do, problem.value_tiles),
  ):
    lax.fori_loop(0, tiles, lambda j, _, x=operand: zero_tile(x, j), None)
  plgpu.commit_smem()


def _for_each_item(problem, refs, run):
  """`n = run(turn, n)` for each item of this block; `_item` says which it is.

  `n` counts this block's steps.
  """
  stride = problem.sizes.num_blocks
  mine = refs.chunk.num_items - lax.axis_index("block")
  turns = lax.div(mine + (stride - 1), jnp.int32(stride))
  lax.fori_loop(jnp.int32(0), turns, run, jnp.int32(0))


def _place(problem, turn):
  """The item's number in its chunk."""
  return lax.axis_index("block") + turn * problem.sizes.num_blocks


def _item(problem, refs, turn):
  """The item's number."""
  return refs.chunk.first_item + _place(problem, turn)


def _for_each_step(problem, run, n, carry):
  """`carry = run(b, n, carry)` for each 64 rows of an item, `b` their number.

  Returns:
    `n` after the item's steps, and `carry`.
  """

  def step(b, carry):
    n, carry = carry
    return n + 1, run(b, n, carry)

  steps = problem.sizes.rows_an_item // TILE
  return lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, (n, carry))


def _query_of(problem, item):
  return lax.div(item, jnp.int32(problem.head_tiles))


def _copies(problem, refs):
  def copy_item(turn, n):
    @pl.when(turn > 0)
    def _():
      plgpu.barrier_wait(refs.item_free)

    item = _item(problem, refs, turn)
    _copy_queries(problem, refs, item)
    first_index = _query_of(problem, item) * problem.sizes.rows_an_item

    def copy_rows(b, n, _):
      indices = copies.load_indices(refs.indices, first_index + b * TILE, TILE)

      @pl.when(n > 0)
      def _():
        plgpu.barrier_wait(refs.k_free)

      for part, tiles in enumerate(problem.parts):
        copies.start_row_copies(
          refs.table,
          refs.chunk.first_row,
          problem.sizes.num_keys,
          indices,
          refs.k.at[0],
          column_tiles=tiles,
        )
        copies.arrive_when_copied(refs.words, part)

    n, _ = _for_each_step(problem, copy_rows, n, None)
    return n

  _for_each_item(problem, refs, copy_item)


def _copy_queries(problem, refs, item):
  for source, target, tiles in (
    (refs.query, refs.q, problem.column_tiles),
    (refs.grad_out, refs.do, problem.value_tiles),
  ):

    def copy_tile(j, _, source=source, target=target):
      plgpu.copy_gmem_to_smem(
        source.at[item, :, pl.ds(TILE * j, TILE)],
        target.at[0, j, pl.ds(0, problem.heads)],
        refs.item_full,
      )

    lax.fori_loop(0, tiles, copy_tile, None)


def _at_hidden_slot(refs, n):
  """The arrays that products read, at slot 0 of 1, unknown to ptxas.

  Were their addresses constant, ptxas would keep every product's operand
  descriptors in registers from step to step, and spill them.
  """
  zero = lax.shift_right_logical(n, jnp.int32(30))
  names = ("q", "do", "k", "p", "ds")
  return refs._replace(**{x: getattr(refs, x).at[zero] for x in names})


def _wait_for_rows(refs, n, part):
  copies.wait(refs.words, part, lax.rem(n, jnp.int32(2)))


def _times_rows(problem, refs, n, left, tiles):
  """`left rows'`, [heads, rows], over the first `tiles` column tiles."""

  def product(sums):
    def add_tile(j, _):
      plgpu.wgmma(
        sums,
        left.at[j],
        refs.k.at[:, pl.ds(TILE * j, TILE)].transpose((1, 0)),
      )

    for part, (first, last) in enumerate(problem.parts):
      _wait_for_rows(refs, n, part)
      lax.fori_loop(first, min(last, tiles), add_tile, None)
    return sums[...]

  return pl.run_scoped(product, plgpu.ACC((TILE, TILE), jnp.float32))


def _accumulators(tiles):
  """First and last column tile of each accumulator of dQ."""
  first, last = tiles
  step = _ACCUMULATOR_TILES
  return [(j, min(j + step, last)) for j in range(first, last, step)]


def _zero_dq(tiles):
  return tuple(
    plgpu.layout_cast(
      jnp.zeros((TILE, TILE * (last - first)), jnp.float32), _LAYOUT
    )
    for first, last in _accumulators(tiles)
  )


def _add_dq(refs, dq, tiles):
  """`dq + dS K`, the last use of `k`."""

  def product(sums):
    for part, (first, last) in zip(sums, _accumulators(tiles), strict=True):
      columns = pl.ds(TILE * first, TILE * (last - first))
      plgpu.wgmma(part, refs.ds, refs.k.at[:, columns])

  dq = pl.run_state(product)(tuple(map(plgpu.ACC.init, dq)))
  plgpu.barrier_arrive(refs.k_free)
  return dq


def _store_dq(problem, refs, item, dq, tiles):
  """Stores dQ by way of `q`, and frees the item."""
  plgpu.barrier_arrive(refs.item_done)
  plgpu.barrier_wait(refs.item_done)
  for part, (first, last) in zip(dq, _accumulators(tiles), strict=True):
    part = part.astype(jnp.bfloat16)
    for j in range(first, last):
      columns = slice(TILE * (j - first), TILE * (j - first + 1))
      refs.q.at[0, j][...] = part[:, columns]
  plgpu.commit_smem()
  for j in range(*tiles):
    plgpu.copy_smem_to_gmem(
      refs.q.at[0, j, pl.ds(0, problem.heads)],
      refs.grad_query.at[item, :, pl.ds(TILE * j, TILE)],
    )
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  plgpu.barrier_arrive(refs.item_free)


def _by_head(ref, item):
  return plgpu.load(ref.at[item], layout=_BY_ROW, optimized=False)


def _scores(problem, refs):
  tiles = problem.dq_tiles[_SCORES]
  scale = problem.scale * math.log2(math.e)

  def run_item(turn, n):
    item = _item(problem, refs, turn)
    log_sum_exp = _by_head(refs.log_sum_exp, item)
    plgpu.barrier_wait(refs.item_full)

    def run_step(_, n, dq):
      at = _at_hidden_slot(refs, n)
      logits = _times_rows(problem, at, n, at.q, problem.column_tiles)
      log_probs = logits * scale - lax.broadcast_in_dim(
        log_sum_exp, logits.shape, [0]
      )
      # Above 0 by rounding; or at index -1, a row of zeros, where P may be
      # anything finite.
      probs = jnp.exp2(jnp.minimum(log_probs, 0.0))

      @pl.when(n > 0)
      def _():
        plgpu.barrier_wait(refs.p_free)

      at.p[...] = probs.astype(jnp.bfloat16)
      plgpu.commit_smem()
      plgpu.barrier_arrive(refs.p_full)
      plgpu.barrier_wait(refs.ds_full)
      return _add_dq(at, dq, tiles)

    n, dq = _for_each_step(problem, run_step, n, _zero_dq(tiles))
    _store_dq(problem, refs, item, dq, tiles)
    return n

  _for_each_item(problem, refs, run_item)
  plgpu.wait_smem_to_gmem(0)


def _probs(problem, refs):
  tiles = problem.dq_tiles[_PROBS]

  def run_item(turn, n):
    item = _item(problem, refs, turn)
    delta = _by_head(refs.delta, item)
    plgpu.barrier_wait(refs.item_full)

    def run_step(_, n, dq):
      at = _at_hidden_slot(refs, n)
      dp = _times_rows(problem, at, n, at.do, problem.value_tiles)
      plgpu.barrier_wait(refs.p_full)
      probs = plgpu.load(at.p, layout=_LAYOUT).astype(jnp.float32)
      ds = probs * (dp - lax.broadcast_in_dim(delta, dp.shape, [0]))
      at.ds[...] = (ds * problem.scale).astype(jnp.bfloat16)
      plgpu.commit_smem()
      plgpu.barrier_arrive(refs.ds_full)
      return _add_dq(at, dq, tiles)

    n, dq = _for_each_step(problem, run_step, n, _zero_dq(tiles))
    _store_dq(problem, refs, item, dq, tiles)
    return n

  _for_each_item(problem, refs, run_item)
  plgpu.wait_smem_to_gmem(0)


def _rows(problem, refs):
  tiles = problem.dq_tiles[_ROWS]
  has_dq = tiles[0] < tiles[1]
  sizes = problem.sizes

  def run_item(turn, n):
    query = _query_of(problem, _item(problem, refs, turn))
    plgpu.barrier_wait(refs.item_full)

    def run_step(b, n, dq):
      at = _at_hidden_slot(refs, n)
      indices = plgpu.load(
        refs.indices.at[query, pl.ds(b * TILE, TILE)],
        layout=_BY_ROW,
        optimized=False,
      )
      reductions.record_rows(
        refs.places,
        refs.bits,
        jnp.minimum(indices, sizes.num_keys - 1),
        _place(problem, turn),
        b * TILE,
      )
      plgpu.barrier_wait(refs.p_full)
      plgpu.barrier_wait(refs.ds_full)
      if has_dq:
        for part in range(len(problem.parts)):
          _wait_for_rows(at, n, part)
        dq = _add_dq(at, dq, tiles)
      first_row = _place(problem, turn) * sizes.rows_an_item + b * TILE
      _store_dk(problem, at, first_row)
      return dq

    n, dq = _for_each_step(problem, run_step, n, _zero_dq(tiles))
    _store_dq(problem, refs, _item(problem, refs, turn), dq, tiles)
    return n

  _for_each_item(problem, refs, run_item)
  plgpu.wait_smem_to_gmem(0)


def _store_dk(problem, refs, first_row):
  """Stores 64 rows of dK, a column tile at a time."""

  def store_tile(j, has_value):
    def product(sums):
      plgpu.wgmma(sums, refs.ds.transpose((1, 0)), refs.q.at[j])
      if has_value:
        plgpu.wgmma(sums, refs.p.transpose((1, 0)), refs.do.at[j])
      return sums[...]

    dk = pl.run_scoped(product, plgpu.ACC((TILE, TILE), jnp.float32))

    @pl.when(j == problem.column_tiles - 1)
    def _():
      plgpu.barrier_arrive(refs.p_free)

    reductions.store_rows(
      refs.addends, first_row, dk.astype(jnp.bfloat16), TILE * j
    )

  values, last = problem.value_tiles, problem.column_tiles
  lax.fori_loop(0, values, lambda j, _: store_tile(j, True), None)
  lax.fori_loop(values, last, lambda j, _: store_tile(j, False), None)
