# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of sparse MLA on Hopper.

A block of 3 warpgroups attends one query's (up to) 64 heads to its rows, 128
at a time. One warpgroup gathers; two multiply. Each of these two takes 64 of
the 128 rows for its logits and one half of the value columns for its output,
so each needs the other's probabilities, which pass through shared memory: an
idea of DeepSeek's FlashMLA. One does its softmax while the other keeps the
tensor cores busy. Both multiply the first 64 rows' values before the second's,
so that the gather can overwrite those while these are in use. On an H200,
32768 keys, 64 heads: 597 TFLOP/s sustained, and no more without any read.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels.hopper import copies
from pallas_kernels.sparse_attention import mosaic_gpu_forward_items as items
from pallas_kernels.sparse_attention.quantization import QuantizedLatents

ROWS = items.ROWS
TILE = items.TILE

_LAYOUT = plgpu.Layout.WGMMA
_BY_HEAD = _LAYOUT.reduce(1)
_BY_KEY = _LAYOUT.reduce(0)
# Below every logit; finite, so that two of them subtract to 0.
_FLOOR = -1e30
# Names of barriers between the two multiplying warpgroups.
_PROBS_0, _PROBS_1, _SUMS = 8, 9, 10


def call(
  problem: items.Problem,
  query: BFloat16[Array, "F N C"],
  table: BFloat16[Array, "BS C"] | QuantizedLatents,
  indices: Int32[Array, "F K"],
  counts: Int32[Array, " F"] | None = None,
) -> tuple[Float[Array, "..."], Float32[Array, "items 64"]]:
  """Runs the kernel.

  Args:
    problem: its sizes.
    query: all batches' queries.
    table: all batches' rows.
    indices: of rows of a query's own batch, -1 for none.
    counts: with `problem.share` above 1: entries of each, which `indices` are.

  Returns:
    Outputs and logarithms of the sums of exponentials. Without splits, the
    outputs are bfloat16 `[F, N, value_dim]`; with them, float32
    `[items, 64, value_dim]`, each of its own part of the rows.
  """
  if problem.splits == 1:
    shape = (*query.shape[:2], problem.value_dim)
    out_type = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  else:
    shape = (problem.items, ROWS, problem.value_dim)
    out_type = jax.ShapeDtypeStruct(shape, jnp.float32)
  lse_type = jax.ShapeDtypeStruct((problem.items, ROWS), jnp.float32)

  def sparse_mla(*refs):
    _body(problem, *refs)

  return plgpu.kernel(
    sparse_mla,
    out_type=(out_type, lse_type),
    scratch_types=_scratch(problem),
    grid=(problem.blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="warpgroup",
    compiler_params=items.compiler_params(),
  )(query, table, items.Selection(indices, counts))


@dataclasses.dataclass(frozen=True)
class _Refs:
  """The kernel's arrays.

  Attributes:
    query: `[F, N, C]`.
    table: `[B S, C]`, or its three arrays.
    selection: of rows.
    out: as `call` returns it.
    log_sum_exp: `[items, 64]`.
    heads: the query's, 64 rows; staging of the output.
    probs: of the first half's keys (and the second's, where there is room).
    by_head: `[4, 64]`: each warpgroup's maxima, then its sums.
    query_full: a query's tiles have arrived.
    rows: of a step.
  """

  query: jax.Ref
  table: jax.Ref | QuantizedLatents
  selection: items.Selection
  out: jax.Ref
  log_sum_exp: jax.Ref
  heads: items.HeadTiles
  probs: jax.Ref
  by_head: jax.Ref
  query_full: jax.Ref
  rows: items.Rows


def _shares_a_tile(problem):
  """Whether the second half's probabilities lie in the query's last tile.

  The query's last tile is in registers while they do. At 576 columns there is
  no room for them elsewhere. Where that tile is also staging for the output
  there is, and it must be.
  """
  return problem.column_tiles > problem.value_tiles


def _scratch(problem):
  return (
    items.heads_scratch(problem, ROWS),
    items.tiled(1 if _shares_a_tile(problem) else 2, ROWS, ROWS),
    plgpu.SMEM((4, ROWS), jnp.float32),
    plgpu.Barrier(num_arrivals=problem.column_tiles),
    *items.rows_scratch(problem),
  )


def _body(problem, *arrays):
  *arrays, rows, words, free_first, free_rest = arrays
  *outer, heads, probs, by_head, query_full = arrays
  refs = _Refs(
    *outer,
    items.head_tiles(heads),
    probs,
    by_head,
    query_full,
    items.Rows(rows, words, (free_first, free_rest)),
  )

  def multiply(half):
    multiplier = _Multiplier(problem, refs, half)
    multiplier.load_query(items.first_item())
    items.for_each_item(problem, multiplier.attend)
    plgpu.wait_smem_to_gmem(0)

  items.run_block(problem, refs.table, refs.selection, refs.rows, multiply)


@dataclasses.dataclass(frozen=True)
class _Multiplier:
  """One of the two warpgroups that multiply.

  Attributes:
    problem: its sizes.
    refs: the kernel's arrays.
    half: 0 or 1: which half of a step's keys has its logits here, and which
      half of the value columns its output.
  """

  problem: items.Problem
  refs: _Refs
  half: int

  @property
  def other(self):
    return 1 - self.half

  def load_query(self, item):
    """Starts loading the tiles that hold this warpgroup's part of the output.

    The second warpgroup reads none of the first's tiles by then, nor the
    other way round: both have their last logits before their last values.
    """
    place = items.place(self.problem, item)
    for tile in self._own_tiles():
      self.refs.heads.load(self.refs.query, place, tile, self.refs.query_full)

  def _own_tiles(self):
    values, columns = self.problem.value_tiles, self.problem.column_tiles
    if self.half:
      return range(values // 2, values)
    # The first warpgroup is the one that reads the second's probabilities, so
    # it knows when the tile that they share is free.
    return (*range(values // 2), *range(values, columns))

  def attend(self, item, step):
    """Attends one item; returns the steps so far."""
    place = items.place(self.problem, item, self.refs.selection)
    plgpu.barrier_wait(self.refs.query_full)
    last_tile = plgpu.load(
      self.refs.heads.tiles.at[self.problem.column_tiles - 1],
      layout=_LAYOUT,
      optimized=False,
    )
    out_shape = (ROWS, self.problem.value_dim // 2)
    carry = (
      _full_of(0.0, out_shape, _LAYOUT),
      _full_of(_FLOOR, (ROWS,), _BY_HEAD),
      _full_of(0.0, (ROWS,), _BY_HEAD),
      step,
    )
    run = self._second if self.half else self._first
    out, maximum, total, step = lax.fori_loop(
      jnp.int32(0), place.steps, lambda _, carry: run(last_tile, *carry), carry
    )
    self._finish(item, place, out, maximum, total)
    return step

  def _first(self, query_tile, out, maximum, total, step):
    """One step of the first warpgroup."""
    refs = self.refs
    logits = self._logits(query_tile, step)
    first_maximum = jnp.maximum(maximum, logits.max(axis=1))
    refs.by_head.at[0][...] = first_maximum
    probs = jnp.exp2(logits - _along_heads(first_maximum, logits.shape))
    rounded = probs.astype(jnp.bfloat16)
    refs.probs.at[0][...] = rounded
    copies.signal(_PROBS_0, 2)
    decay = jnp.exp2(maximum - first_maximum)
    total = total * decay + probs.sum(axis=1)
    out = self._add_values(out, decay, rounded, 0)
    refs.rows.release(half=0, part=0, arrivals=2)
    copies.synchronize(_PROBS_1, 2)
    maximum = self._read(1)
    decay = jnp.exp2(first_maximum - maximum)
    refs.rows.wait(1, 0, step)
    out = self._add_values(out, decay, self._probs_1(), 1)
    refs.rows.release(half=1, part=0)
    return out, maximum, total * decay, step + 1

  def _second(self, query_tile, out, maximum, total, step):
    """One step of the second warpgroup."""
    refs = self.refs
    logits = self._logits(query_tile, step)
    own_maximum = logits.max(axis=1)
    copies.synchronize(_PROBS_0, 2)
    first_maximum = self._read(0)
    own_maximum = jnp.maximum(first_maximum, own_maximum)
    refs.by_head.at[1][...] = own_maximum
    probs = jnp.exp2(logits - _along_heads(own_maximum, logits.shape))
    rounded = probs.astype(jnp.bfloat16)
    self._probs_1()[...] = rounded
    copies.signal(_PROBS_1, 2)
    total = total * jnp.exp2(maximum - own_maximum) + probs.sum(axis=1)
    refs.rows.wait(0, 1, step)
    out = self._add_values(
      out,
      jnp.exp2(maximum - first_maximum),
      refs.probs.at[copies.opaque(0)],
      0,
    )
    refs.rows.release(half=0, part=1)
    out = self._add_values(
      out, jnp.exp2(first_maximum - own_maximum), rounded, 1
    )
    refs.rows.release(half=1, part=1, arrivals=2)
    return out, own_maximum, total, step + 1

  def _add_values(self, out, decay, probs, half):
    """`decay` times the output, plus a half's probabilities times values."""
    out = out * _along_heads(decay, out.shape)

    def multiply(accumulator):
      plgpu.wgmma(accumulator, probs, self._values(half))

    return pl.run_state(multiply)(plgpu.ACC.init(out))

  def _logits(self, query_tile, step):
    """This half's logits in units of log 2; -inf where there is no row."""
    refs, half = self.refs, self.half
    last = self.problem.column_tiles - 1

    def multiply(accumulator):
      slot = copies.opaque(half)
      zero = copies.opaque(0)
      for part in range(2):
        refs.rows.wait(half, part, step)
        for tile in range(*self.problem.parts[part]):
          plgpu.wgmma(
            accumulator,
            query_tile if tile == last else refs.heads.tiles.at[zero + tile],
            refs.rows.rows.at[slot, :, pl.ds(TILE * tile, TILE)].transpose(
              (1, 0)
            ),
          )
      index = refs.rows.indices(half, _BY_KEY)
      return accumulator[...], index

    logits, index = pl.run_scoped(
      multiply, plgpu.ACC((ROWS, ROWS), jnp.float32)
    )
    # The other warpgroup's part: it frees it once more, after its values.
    refs.rows.release(half=half, part=self.other)
    logits = logits * (self.problem.scale * math.log2(math.e))
    return jnp.where(self._is_selected(index), logits, -jnp.inf)

  def _is_selected(self, index):
    """`[heads, keys]`: whether the head's query has the row of the key."""
    shape = (ROWS, ROWS)
    share = self.problem.share
    if share == 1:
      return lax.broadcast_in_dim(index >= 0, shape, [1])
    query = lax.div(
      plgpu.layout_cast(lax.iota(jnp.int32, ROWS), _BY_HEAD),
      jnp.int32(self.problem.heads // share),
    )
    # Behind the last query's heads the bit is the sign, which an entry lacks.
    bit = lax.shift_left(jnp.int32(1), jnp.minimum(query, share) + (31 - share))
    entry = jnp.maximum(index, 0)
    return (
      lax.broadcast_in_dim(entry, shape, [1])
      & lax.broadcast_in_dim(bit, shape, [0])
    ) != 0

  def _values(self, half):
    """This warpgroup's value columns of a half of the rows."""
    columns = self.problem.value_dim // 2
    return self.refs.rows.rows.at[
      copies.opaque(half), :, pl.ds(columns * self.half, columns)
    ]

  def _probs_1(self):
    if _shares_a_tile(self.problem):
      return self.refs.heads.tiles.at[
        copies.opaque(self.problem.column_tiles - 1)
      ]
    return self.refs.probs.at[1]

  def _read(self, row):
    return plgpu.load(
      self.refs.by_head.at[row], layout=_BY_HEAD, optimized=False
    )

  def _finish(self, item, place, out, maximum, total):
    """Divides by the sum, starts the stores and the next query's loads."""
    self.refs.by_head.at[2 + self.half][...] = total
    copies.synchronize(_SUMS, 2)
    total = total + self._read(2 + self.other)
    inverse = jnp.where(total == 0, 0.0, 1 / total)
    out = out * _along_heads(inverse, out.shape)
    if self.half == 0:
      log_sum_exp = (maximum + jnp.log2(total)) * math.log(2)
      self.refs.log_sum_exp.at[item][...] = jnp.where(
        total == 0, -jnp.inf, log_sum_exp
      )
    if self.problem.splits > 1:
      columns = self.problem.value_dim // 2
      self.refs.out.at[item, :, pl.ds(columns * self.half, columns)][...] = out
    else:
      self._store(place, out.astype(jnp.bfloat16))
    next_item = item + self.problem.blocks

    @pl.when(next_item < self.problem.items)
    def _():
      self.load_query(next_item)

  def _store(self, place, out):
    tiles = range(self.problem.value_tiles // 2)
    first = self.half * len(tiles)
    for tile in tiles:
      self.refs.heads.tiles.at[first + tile][...] = out[
        :, TILE * tile : TILE * (tile + 1)
      ]
    plgpu.commit_smem()
    for tile in tiles:
      self.refs.heads.store(self.refs.out, place, first + tile)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _full_of(value, shape, layout):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _along_heads(x, shape):
  return lax.broadcast_in_dim(x, shape, [0])
