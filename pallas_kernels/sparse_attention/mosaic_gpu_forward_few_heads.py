# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of sparse MLA on Hopper for at most 32 heads.

wgmma has 64 rows. With so few heads the rows here are keys, then value
columns, and heads are columns of every product: `S^T = K Q^T`, `O^T = V^T P^T`.
Each of the two multiplying warpgroups takes every other 64 rows of the cache
for a softmax and an output of its own; they are joined at a query's end. On an
H200 and 131072 keys, 20 heads' rows come at 5.6 TB/s, where the kernel for 64
heads, its rows of heads padded, has 4.4.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.hopper import copies, fragments
from pallas_kernels.sparse_attention import mosaic_gpu_forward_items as items
from pallas_kernels.sparse_attention.quantization import QuantizedLatents

ROWS = items.ROWS
TILE = items.TILE
# The output of 512 columns is 4 registers a head in each thread.
MAX_HEADS = 32

_LAYOUT = plgpu.Layout.WGMMA
_BY_ROW = _LAYOUT.reduce(1)
_BY_HEAD = _LAYOUT.reduce(0)
# Below every logit; finite, so that two of them subtract to 0.
_FLOOR = -1e30
# Name of a barrier between the two multiplying warpgroups.
_BOTH = 8


def call(
  problem: items.Problem,
  query: BFloat16[Array, "F N C"],
  table: BFloat16[Array, "BS C"] | QuantizedLatents,
  indices: Int32[Array, "F K"],
) -> tuple[BFloat16[Array, "F N V"], Float32[Array, "F 64"]]:
  """Runs the kernel.

  Args:
    problem: its sizes; one tile of heads, without splits.
    query: all batches' queries.
    table: all batches' rows.
    indices: of rows of a query's own batch, -1 for none.

  Returns:
    Outputs and logarithms of the sums of exponentials.
  """

  def sparse_mla_few_heads(*refs):
    _body(problem, *refs)

  heads = problem.heads
  shape = (*query.shape[:2], problem.value_dim)
  return plgpu.kernel(
    sparse_mla_few_heads,
    out_type=(
      jax.ShapeDtypeStruct(shape, jnp.bfloat16),
      jax.ShapeDtypeStruct((problem.flat_queries, ROWS), jnp.float32),
    ),
    scratch_types=(
      items.heads_scratch(problem, heads),
      items.tiled(2, heads, ROWS),
      plgpu.SMEM((2, fragments.rows_scratch_words(heads)), jnp.float32),
      plgpu.SMEM((5, ROWS), jnp.float32),
      plgpu.Barrier(num_arrivals=problem.column_tiles),
      *items.rows_scratch(problem),
    ),
    grid=(problem.blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="warpgroup",
    compiler_params=items.compiler_params(),
  )(query, table, indices)


@dataclasses.dataclass(frozen=True)
class _Refs:
  """The kernel's arrays.

  Attributes:
    query: `[F, N, C]`.
    table: `[B S, C]`, or its three arrays.
    indices: `[F, K]`.
    out: `[F, N, value_dim]`.
    log_sum_exp: `[F, 64]`.
    heads: the query's; after its last logits, what the warpgroups exchange,
      then staging of the output.
    probs: `[2, heads, 64 keys]`: each warpgroup's.
    reductions: each warpgroup's scratch of them.
    by_head: `[5, 64]`: each warpgroup's maxima, then its sums, then the
      log-sum-exp.
    query_full: a query's tiles have arrived.
    rows: of a step.
  """

  query: jax.Ref
  table: jax.Ref | QuantizedLatents
  indices: jax.Ref
  out: jax.Ref
  log_sum_exp: jax.Ref
  heads: items.HeadTiles
  probs: jax.Ref
  reductions: jax.Ref
  by_head: jax.Ref
  query_full: jax.Ref
  rows: items.Rows


def _body(problem, *arrays):
  *arrays, rows, words, free_first, free_rest = arrays
  *outer, heads, probs, reductions, by_head, query_full = arrays
  refs = _Refs(
    *outer,
    items.head_tiles(heads),
    probs,
    reductions,
    by_head,
    query_full,
    items.Rows(rows, words, (free_first, free_rest)),
  )

  def multiply(half):
    multiplier = _Multiplier(problem, refs, half)
    multiplier.load_query(items.first_item())
    items.for_each_item(problem, multiplier.attend)
    plgpu.wait_smem_to_gmem(0)

  selection = items.Selection(refs.indices)
  items.run_block(problem, refs.table, selection, refs.rows, multiply)


@dataclasses.dataclass(frozen=True)
class _Multiplier:
  """One of the two warpgroups that multiply.

  Attributes:
    problem: its sizes.
    refs: the kernel's arrays.
    half: 0 or 1: which half of a step's keys is this warpgroup's, and which
      half of the value columns it joins and stores.
  """

  problem: items.Problem
  refs: _Refs
  half: int

  @property
  def other(self):
    return 1 - self.half

  def load_query(self, item):
    """Starts loading the tiles that this warpgroup stored its output from."""
    place = items.place(self.problem, item)
    for tile in range(*self.problem.parts[self.half]):
      self.refs.heads.load(self.refs.query, place, tile, self.refs.query_full)

  def attend(self, item, step):
    """Attends one item; returns the steps so far."""
    heads = self.problem.heads
    columns = self.problem.value_dim // 2
    plgpu.barrier_wait(self.refs.query_full)
    carry = (
      _full_of(0.0, (columns, heads), _LAYOUT),
      _full_of(0.0, (columns, heads), _LAYOUT),
      _full_of(_FLOOR, (heads,), _BY_HEAD),
      _full_of(0.0, (ROWS, heads), _LAYOUT),
      step,
    )
    *outs, maximum, totals, step = lax.fori_loop(
      jnp.int32(0),
      items.place(self.problem, item).steps,
      lambda _, carry: self._step(*carry),
      carry,
    )
    self._finish(item, outs, maximum, totals)
    return step

  def _step(self, first_out, second_out, maximum, totals, step):
    """One step; `totals` has a row for each of the 64 keys' places."""
    refs, half = self.refs, self.half
    logits = self._logits(step)
    previous = maximum
    maximum = jnp.maximum(
      maximum, fragments.reduce_rows(logits, "max", refs.reductions.at[half])
    )
    probs = jnp.exp2(logits - _along_rows(maximum, logits.shape))
    decay = jnp.exp2(previous - maximum)
    totals = totals * _along_rows(decay, totals.shape) + probs
    refs.probs.at[half].transpose((1, 0))[...] = _transposed(probs)
    plgpu.commit_smem()
    decay = _along_rows(decay, first_out.shape)

    def multiply(accumulators):
      probs = refs.probs.at[copies.opaque(half)].transpose((1, 0))
      for part, accumulator in enumerate(accumulators):
        plgpu.wgmma(accumulator, self._values(part), probs)
      plgpu.wgmma_wait(1)
      refs.rows.release(half=half, part=0, arrivals=2)

    first_out, second_out = pl.run_state(multiply)(
      (
        plgpu.ACC.init(first_out * decay),
        plgpu.ACC.init(second_out * decay),
      )
    )
    refs.rows.release(half=half, part=1, arrivals=2)
    return first_out, second_out, maximum, totals, step + 1

  def _logits(self, step):
    """`[keys, heads]`, in units of log 2; -inf where there is no row."""
    refs, half = self.refs, self.half

    def multiply(accumulator):
      slot = copies.opaque(half)
      zero = copies.opaque(0)
      for part in range(2):
        refs.rows.wait(half, part, step)
        for tile in range(*self.problem.parts[part]):
          plgpu.wgmma(
            accumulator,
            refs.rows.rows.at[slot, :, pl.ds(TILE * tile, TILE)],
            refs.heads.tiles.at[zero + tile].transpose((1, 0)),
          )
      return accumulator[...], refs.rows.indices(half, _BY_ROW)

    logits, index = pl.run_scoped(
      multiply, plgpu.ACC((ROWS, self.problem.heads), jnp.float32)
    )
    logits = logits * (self.problem.scale * math.log2(math.e))
    is_row = lax.broadcast_in_dim(index >= 0, logits.shape, [0])
    return jnp.where(is_row, logits, -jnp.inf)

  def _values(self, part):
    """A half of the value columns, `[columns, keys]`."""
    columns = self.problem.value_dim // 2
    rows = self.refs.rows.rows.at[
      copies.opaque(self.half), :, pl.ds(columns * part, columns)
    ]
    return rows.transpose((1, 0))

  def _finish(self, item, outs, maximum, totals):
    """Joins the two softmaxes, starts the stores and the next loads."""
    refs, half = self.refs, self.half
    total = fragments.reduce_rows(totals, "add", refs.reductions.at[half])
    self._by_head(half)[...] = maximum
    self._by_head(2 + half)[...] = total
    copies.synchronize(_BOTH, 2)
    joined = jnp.maximum(maximum, self._read(self.other))
    own = jnp.exp2(maximum - joined)
    other = jnp.exp2(self._read(self.other) - joined)
    total = own * total + other * self._read(2 + self.other)
    factor = own * jnp.where(total == 0, 0.0, 1 / total)
    if half == 0:
      log_sum_exp = (joined + jnp.log2(total)) * math.log(2)
      self._by_head(4)[...] = jnp.where(total == 0, -jnp.inf, log_sum_exp)
    factor = _along_rows(factor, outs[0].shape)
    self._store(item, self._join([out * factor for out in outs]))
    next_item = item + self.problem.blocks

    @pl.when(next_item < self.problem.items)
    def _():
      self.load_query(next_item)

  def _join(self, outs):
    """The sum of the two warpgroups' outputs, in this one's columns."""
    words = self.refs.heads.tiles
    joined = None
    for part in range(2):
      if part != self.half:
        fragments.put(outs[part], words)
      copies.synchronize(_BOTH, 2)
      if part == self.half:
        joined = outs[part] + fragments.get(outs[part].shape, words)
      copies.synchronize(_BOTH, 2)
    return joined

  def _store(self, item, out):
    refs, half = self.refs, self.half
    count = self.problem.value_tiles // 2
    tiles = range(half * count, (half + 1) * count)
    for i, tile in enumerate(tiles):
      refs.heads.tiles.at[tile].transpose((1, 0))[...] = _transposed(
        out[TILE * i : TILE * (i + 1)]
      )
    plgpu.commit_smem()
    place = items.place(self.problem, item)
    for tile in tiles:
      refs.heads.store(refs.out, place, tile)
    if half == 0:
      # A whole row: a part of it is no whole number of cache lines.
      plgpu.copy_smem_to_gmem(refs.by_head.at[4], refs.log_sum_exp.at[item])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def _by_head(self, row):
    return self.refs.by_head.at[row, pl.ds(0, self.problem.heads)]

  def _read(self, row):
    return plgpu.load(self._by_head(row), layout=_BY_HEAD, optimized=False)


def _transposed(x):
  """In bfloat16, in registers as a store to a transposed array wants them."""
  return plgpu.layout_cast(
    x.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED
  )


def _full_of(value, shape, layout):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _along_rows(x, shape):
  return lax.broadcast_in_dim(x, shape, [1])
