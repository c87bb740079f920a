# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The work of a block of the forward kernels, and the gather that feeds it.

The kernels take a query's rows 128 at a time: two halves of 64, one for each of
two warpgroups that multiply, each half's columns in two parts. A third
warpgroup gathers them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import copies, float8_rows
from pallas_kernels.sparse_attention import (
  mosaic_gpu_shared_rows as shared_rows,
)
from pallas_kernels.sparse_attention.quantization import QuantizedLatents

# Rows of wgmma: heads of a tile, and keys of half a step.
ROWS = 64
STEP_KEYS = 2 * ROWS
TILE = copies.TILE
# Registers of a thread that multiplies, and of one that gathers: the launch
# deals 168 to each, and the sum of the three warpgroups must not grow.
_REGISTERS = (224, 56)
# Of the int32 scratch: barriers in front, the step's indices behind.
INDEX_WORDS = 128


@dataclasses.dataclass(frozen=True)
class Problem:
  """A call's sizes.

  Attributes:
    batch: caches.
    num_queries: of each cache.
    num_keys: rows of each cache.
    heads: of a tile: 64, or if it is the only one a multiple of 8 up to 64,
      of which the query may have fewer.
    head_tiles: of a query.
    width: of a row; a multiple of 64.
    value_dim: its leading columns that are values; a multiple of 128.
    count: rows of a query, a multiple of `STEP_KEYS`.
    scale: factor on the logits.
    num_multiprocessors: blocks of the grid at most.
    splits: parts of a query's rows that different blocks take.
    share: where above 1, "a query" here is so many that follow each other:
      their heads are one tile, of any number of heads, their rows those of
      `mosaic_gpu_shared_rows`.
  """

  batch: int
  num_queries: int
  num_keys: int
  heads: int
  head_tiles: int
  width: int
  value_dim: int
  count: int
  scale: float
  num_multiprocessors: int
  splits: int = 1
  share: int = 1

  def with_splits(self, splits: int) -> "Problem":
    """The same problem, a query's rows in that many parts."""
    return dataclasses.replace(self, splits=splits)

  @property
  def index_mask(self) -> int | None:
    """Bits of a word of indices that are the index and its sign."""
    if self.share == 1:
      return None
    return -(1 << 31) | shared_rows.most_rows(self.share) - 1

  @property
  def flat_queries(self) -> int:
    """Of all batches."""
    return self.batch * self.num_queries

  @property
  def items(self) -> int:
    """Units of work: a query, a tile of its heads, a part of its rows."""
    return self.flat_queries * self.head_tiles * self.splits

  @property
  def steps(self) -> int:
    """Of a query."""
    return self.count // STEP_KEYS

  @property
  def steps_a_split(self) -> int:
    """The last split may have fewer."""
    return -(-self.steps // self.splits)

  @property
  def blocks(self) -> int:
    """Of the grid; each runs every `blocks`-th item."""
    return min(self.items, self.num_multiprocessors)

  @property
  def column_tiles(self) -> int:
    """Of a row."""
    return self.width // TILE

  @property
  def value_tiles(self) -> int:
    """The first of them: those that are values."""
    return self.value_dim // TILE

  @property
  def parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last tiles of the two parts: half of the values, the rest."""
    middle = self.value_tiles // 2
    return (0, middle), (middle, self.column_tiles)

  @property
  def value_parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same of the values alone."""
    middle = self.value_tiles // 2
    return (0, middle), (middle, self.value_tiles)


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of a step, and what guards them.

  Attributes:
    rows: `[2, 64, C]` in shared memory: the halves.
    words: int32 in shared memory: the gather's barriers, the rows' indices.
    free: for each part of the columns, two barriers, one a half: that part may
      be overwritten.
  """

  rows: jax.Ref
  words: jax.Ref
  free: tuple[jax.Ref, jax.Ref]

  def initialize(self):
    """Every thread of the block must call it."""
    copies.initialize_barriers(self.words, [copies.WARPGROUP] * 4)

  def wait(self, half, part, step):
    """Waits for a part of a half.

    A warpgroup waits either for every step's or for none's: the part is
    overwritten once those that wait for it have released it, and who then
    asks for the step before waits forever.
    """
    copies.wait(self.words, _full(half, part), lax.rem(step, jnp.int32(2)))

  def release(self, *, half, part, arrivals=1):
    """Gives one of the two arrivals (or both) for a part to be overwritten."""
    for _ in range(arrivals):
      plgpu.barrier_arrive(self.free[part].at[half])

  def indices(self, half, layout):
    """The indices of a half's rows, -1 for none."""
    return plgpu.load(
      self.words.at[pl.ds(INDEX_WORDS + half * ROWS, ROWS)],
      layout=layout,
      optimized=False,
    )


def rows_scratch(problem: Problem) -> tuple:
  """Scratch of `Rows`: rows, words, and the two parts' barriers."""
  return (
    tiled(2, ROWS, problem.width),
    plgpu.SMEM((INDEX_WORDS + STEP_KEYS,), jnp.int32),
    plgpu.Barrier(num_arrivals=2, num_barriers=2),
    plgpu.Barrier(num_arrivals=2, num_barriers=2),
  )


def tiled(*shape):
  """Shared memory that wgmma reads."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=copies.TRANSFORMS)


def heads_scratch(problem: Problem, rows: int) -> plgpu.RefUnion:
  """Scratch of `HeadTiles`: `rows` heads, of which a query may lack some."""
  shape = (problem.column_tiles, rows, TILE)
  # wgmma's tiles of 8 rows follow each other, so tiles of more rows are the
  # same bytes. A copy needs them: it clips what lies behind the array's rows
  # where the array has fewer than a tile.
  boxes = plgpu.TilingTransform((rows, TILE)), copies.TRANSFORMS[1]
  return plgpu.RefUnion(
    tiled(*shape), plgpu.SMEM(shape, jnp.bfloat16, transforms=boxes)
  )


class HeadTiles(NamedTuple):
  """A query's heads in shared memory, or their outputs on the way out.

  Attributes:
    tiles: `[column tiles, heads, 64]`, for products.
    boxes: the same memory, for copies.
  """

  tiles: jax.Ref
  boxes: jax.Ref

  def load(self, query, place, tile, barrier):
    """Starts loading a tile; heads that the query lacks become 0."""
    plgpu.copy_gmem_to_smem(
      query.at[place.query, self._heads(place), _columns(tile)],
      self.boxes.at[tile],
      barrier,
    )

  def store(self, out, place, tile):
    """Starts storing a tile, but for heads that the query lacks."""
    plgpu.copy_smem_to_gmem(
      self.boxes.at[tile],
      out.at[place.query, self._heads(place), _columns(tile)],
    )

  def _heads(self, place):
    rows = self.boxes.shape[1]
    return pl.ds(place.head_tile * rows, rows)


def head_tiles(scratch: tuple[jax.Ref, jax.Ref]) -> HeadTiles:
  """Of what `heads_scratch` becomes in a kernel."""
  return HeadTiles(*scratch)


def _columns(tile):
  return pl.ds(TILE * tile, TILE)


def compiler_params() -> plgpu.CompilerParams:
  """Of kernels that place every barrier themselves."""
  return plgpu.CompilerParams(
    approx_math=True,
    unsafe_no_auto_barriers=True,
    reduction_scratch_bytes=0,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
  )


class Selection(NamedTuple):
  """Which rows the queries attend to.

  Attributes:
    indices: `[F, K]`; with shared rows, entries of `mosaic_gpu_shared_rows`.
    counts: with them, how many, `[F]`; else None: K.
  """

  indices: jax.Ref
  counts: jax.Ref | None = None


def run_block(
  problem: Problem,
  table: jax.Ref | QuantizedLatents,
  selection: Selection,
  rows: Rows,
  multiply: Callable[[int], None],
):
  """Runs a block's three warpgroups: `multiply(0)`, `multiply(1)`, gather."""
  warpgroup = lax.axis_index("warpgroup")
  rows.initialize()
  multiplier_registers, gatherer_registers = _REGISTERS

  @pl.when(warpgroup == 2)
  def _():
    plgpu.set_max_registers(gatherer_registers, action="decrease")
    for_each_item(
      problem, functools.partial(_gather, problem, table, selection, rows)
    )

  for half in range(2):

    @pl.when(warpgroup == half)
    def _(half=half):
      plgpu.set_max_registers(multiplier_registers, action="increase")
      multiply(half)


def for_each_item(
  problem: Problem, function: Callable[[jax.Array, jax.Array], jax.Array]
):
  """Runs `step = function(item, step)` over the block's items.

  `step` counts the block's steps of 128 keys, from 0.
  """
  first = first_item()
  count = lax.div(
    jnp.int32(problem.items - 1 + problem.blocks) - first,
    jnp.int32(problem.blocks),
  )

  def run(i, step):
    return function(first + i * problem.blocks, step)

  lax.fori_loop(jnp.int32(0), count, run, jnp.int32(0))


def first_item() -> jax.Array:
  """Of this block."""
  return lax.axis_index("block")


class Place(NamedTuple):
  """What an item is, all int32 scalars.

  Attributes:
    first_row: of its batch in the table.
    query: of all batches'.
    head_tile: of the query.
    first_step: of the query's.
    steps: of the item.
  """

  first_row: jax.Array
  query: jax.Array
  head_tile: jax.Array
  first_step: jax.Array
  steps: jax.Array


def place(
  problem: Problem, item: jax.Array, selection: Selection | None = None
) -> Place:
  """Tiles of a query are neighbours: they share its rows in the cache.

  Args:
    problem: the sizes.
    item: its number.
    selection: its rows; None where `steps` is not used.
  """
  split = lax.rem(item, jnp.int32(problem.splits))
  tile = lax.div(item, jnp.int32(problem.splits))
  query = lax.div(tile, jnp.int32(problem.head_tiles))
  first_step = split * problem.steps_a_split
  last_step = problem.steps
  if selection is not None and selection.counts is not None:
    last_step = lax.div(
      selection.counts[query] + jnp.int32(STEP_KEYS - 1), jnp.int32(STEP_KEYS)
    )
  return Place(
    first_row=lax.div(query, jnp.int32(problem.num_queries)) * problem.num_keys,
    query=query,
    head_tile=lax.rem(tile, jnp.int32(problem.head_tiles)),
    first_step=first_step,
    steps=jnp.minimum(problem.steps_a_split, last_step - first_step),
  )


def _gather(
  problem: Problem,
  table: jax.Ref | QuantizedLatents,
  selection: Selection,
  rows: Rows,
  item: jax.Array,
  step: jax.Array,
) -> jax.Array:
  """Fills `rows` for each step of an item; returns the steps so far."""
  indices = selection.indices
  where = place(problem, item, selection)
  fill = _fill_float8 if isinstance(table, QuantizedLatents) else _fill

  def run(i, step):
    start = where.query * problem.count + (where.first_step + i) * STEP_KEYS
    registers = [
      copies.load_indices(
        indices, start + half * ROWS, ROWS, problem.index_mask
      )
      for half in range(2)
    ]

    def begin(half, part):
      @pl.when(step >= 1)
      def _():
        plgpu.barrier_wait(rows.free[part].at[half])

      if part == 0:
        copies.start_word_copies(
          indices,
          start + half * ROWS,
          rows.words,
          INDEX_WORDS + half * ROWS,
        )
      return where.first_row, problem.num_keys, registers[half]

    fill(problem, table, rows, begin, step)
    return step + 1

  return lax.fori_loop(jnp.int32(0), where.steps, run, step)


# Half and part, in the order in which they become free.
_UNITS = tuple(itertools.product(range(2), range(2)))


def _fill(problem, table, rows, begin, step):
  """Fills a step; `begin` waits for a part and says which rows go there."""
  del step
  for half, part in _UNITS:
    copies.start_row_copies(
      table,
      *begin(half, part),
      rows.rows.at[half],
      column_tiles=problem.parts[part],
    )
    copies.arrive_when_copied(rows.words, _full(half, part))


def _fill_float8(problem, latents, rows, begin, step):
  """The same of float8 rows, which this warpgroup widens once they are here.

  In a block's first step all is free, so all copies start at once. In the
  others a part is widened while the second half is still in use, whose copies
  start before the rest is widened: its logits wait for nothing else.
  """

  def start(half, part):
    first, last = problem.value_parts[part]
    rest = problem.column_tiles - problem.value_tiles
    # Else ptxas keeps every row's address from one step to the next.
    places = *begin(half, part), rows.rows.at[copies.opaque(half)]
    # No policy of the cache, for what `copies` says that ptxas makes of one.
    copies.start_row_copies(
      latents.values,
      *places,
      column_tiles=(first // 2, last // 2),
      to_tile=first,
      is_kept=False,
    )
    copies.start_scale_copies(
      latents.scales, *places, to_tile=(first + last) // 2
    )
    if part == 1:
      copies.start_row_copies(
        latents.rest,
        *places,
        column_tiles=(0, rest),
        to_tile=problem.value_tiles,
        is_kept=False,
      )

  def start_second_half(is_now):
    for part in range(2):
      pl.when(is_now)(functools.partial(start, 1, part))
      # Of nothing, else: the number of groups is what `finish` counts.
      copies.commit()

  def finish(half, part, *, pending):
    first, last = problem.value_parts[part]
    copies.wait_groups(pending)
    float8_rows.widen(
      rows.rows.at[copies.opaque(half)], tiles=(first, last), scale=first // 2
    )
    copies.arrive(rows.words, _full(half, part))

  for part in range(2):
    start(0, part)
    copies.commit()
  start_second_half(step == 0)
  finish(0, 0, pending=3)
  start_second_half(step >= 1)
  finish(0, 1, pending=4)
  finish(1, 0, pending=1)
  finish(1, 1, pending=0)


def _full(half, part):
  """The gather's barrier of a part of the columns of a half."""
  return 2 * half + part
