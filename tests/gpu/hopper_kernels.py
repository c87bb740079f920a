# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The least kernels that call `pallas_kernels.hopper`'s functions.

A block each. What they compute is plain to see: rows of a table, sums and
maxima of columns, what went in.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import copies, fragments, reductions, row_sums

ROWS = 64
TILE = copies.TILE
_LAYOUT = plgpu.Layout.WGMMA
_BY_ROW = _LAYOUT.reduce(1)
# Names of barriers.
_READ, _FREE = 8, 9


def _call(body, out_type, scratch_types, args, *, warpgroups=1, blocks=1):
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch_types,
    grid=(blocks,),
    grid_names=("block",),
    num_threads=warpgroups,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
    ),
  )(*args)


def _tiled(*shape):
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=copies.TRANSFORMS)


def _barrier_words(count):
  return plgpu.SMEM((count * copies.BARRIER_WORDS,), jnp.int32)


def _columns(tile):
  return pl.ds(TILE * tile, TILE)


def _load(ref, layout=_LAYOUT):
  return plgpu.load(ref, layout=layout, optimized=False)


def gather(
  table, indices, *, first_row, num_rows, step_rows=ROWS, column_tiles,
  to_tile=None, is_kept=True,
):  # fmt: skip
  """Rows of a table, through shared memory and a barrier's phases.

  As the copy engine reads what lies there: bfloat16 `[rows, columns]`, zeros
  in tiles that are not copied.
  """
  first, last = column_tiles
  tiles = last if to_tile is None else to_tile + last - first
  shape = (step_rows, TILE * tiles)

  def body(table, indices, zeros, out, rows, words, zeros_full):
    copies.initialize_barriers(words, [copies.WARPGROUP])
    plgpu.copy_gmem_to_smem(zeros, rows, zeros_full)
    plgpu.barrier_wait(zeros_full)

    def step(i, _):
      start = i * step_rows
      copies.start_row_copies(
        table,
        first_row,
        num_rows,
        copies.load_indices(indices, start, step_rows),
        rows,
        column_tiles=column_tiles,
        to_tile=to_tile,
        is_kept=is_kept,
      )
      copies.arrive_when_copied(words, 0)
      copies.wait(words, 0, lax.rem(i, jnp.int32(2)))
      plgpu.copy_smem_to_gmem(rows, out.at[pl.ds(start, step_rows)])
      plgpu.wait_smem_to_gmem(0)
      copies.synchronize(_READ, 1)

    steps = indices.shape[0] // step_rows
    lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, None)

  return _call(
    body,
    jax.ShapeDtypeStruct((indices.shape[0], TILE * tiles), jnp.bfloat16),
    [_tiled(*shape), _barrier_words(1), plgpu.Barrier()],
    (table, indices, jnp.zeros(shape, jnp.bfloat16)),
  )


def _gather_tile(table, indices, rows, words):
  copies.initialize_barriers(words, [copies.WARPGROUP])
  copies.start_row_copies(
    table,
    0,
    table.shape[0],
    copies.load_indices(indices, 0, ROWS),
    rows,
    column_tiles=(0, 1),
  )
  copies.arrive_when_copied(words, 0)
  copies.wait(words, 0, 0)


def gather_products(table, indices):
  """64 rows of 64 columns as the matrix units read them, in float32."""

  def body(table, indices, identity, out, rows, words, right, right_full):
    plgpu.copy_gmem_to_smem(identity, right, right_full)
    _gather_tile(table, indices, rows, words)
    plgpu.barrier_wait(right_full)

    def multiply(sums):
      plgpu.wgmma(sums, rows, right)
      return sums[...]

    out[...] = pl.run_scoped(multiply, plgpu.ACC((ROWS, TILE), jnp.float32))

  return _call(
    body,
    jax.ShapeDtypeStruct((ROWS, TILE), jnp.float32),
    [
      _tiled(ROWS, TILE),
      _barrier_words(1),
      _tiled(TILE, TILE),
      plgpu.Barrier(),
    ],
    (table, indices, jnp.eye(TILE, dtype=jnp.bfloat16)),
  )


def gather_doubled(table, indices):
  """64 rows of 64 columns, doubled in float32 registers, and stored."""

  def body(table, indices, out, rows, words):
    _gather_tile(table, indices, rows, words)
    values = plgpu.load(rows, layout=_LAYOUT).astype(jnp.float32)
    reductions.store_rows(out, 0, (2 * values).astype(jnp.bfloat16), 0)

  return _call(
    body,
    jax.ShapeDtypeStruct((ROWS, TILE), jnp.bfloat16),
    [_tiled(ROWS, TILE), _barrier_words(1)],
    (table, indices),
  )


def gather_scales(scales, indices, *, to_tile, start):
  """Tiles of which `to_tile` has rows' scales in front; and 64 of the indices.

  Those from `start` on. By groups of copies in the place of a barrier.
  """

  def body(scales, indices, out, words_out, rows, words):
    copies.start_word_copies(indices, start, words, ROWS)
    copies.commit()
    copies.start_scale_copies(
      scales,
      0,
      scales.shape[0],
      copies.load_indices(indices, start, ROWS),
      rows,
      to_tile=to_tile,
    )
    copies.commit()
    copies.wait_groups(1)
    copies.synchronize(_READ, 1)
    words_out[...] = _load(words.at[pl.ds(ROWS, ROWS)], _BY_ROW)
    copies.wait_groups(0)
    copies.synchronize(_READ, 1)
    plgpu.copy_smem_to_gmem(rows, out)
    plgpu.wait_smem_to_gmem(0)

  shape = (ROWS, TILE * (to_tile + 1))
  return _call(
    body,
    (
      jax.ShapeDtypeStruct(shape, jnp.bfloat16),
      jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    ),
    [_tiled(*shape), plgpu.SMEM((2 * ROWS,), jnp.int32)],
    (scales, indices),
  )


def exchange(values):
  """Each of `[n, rows, columns]`, from one warpgroup by way of another."""
  count, *shape = values.shape

  def body(values, out, words, barriers):
    copies.initialize_barriers(barriers, [copies.WARPGROUP])
    warpgroup = lax.axis_index("warpgroup")

    def put(i, _):
      @pl.when(i > 0)
      def _():
        copies.synchronize(_FREE, 2)

      fragments.put(_load(values.at[i]), words)
      copies.arrive(barriers, 0)

    def get(i, _):
      copies.wait(barriers, 0, lax.rem(i, jnp.int32(2)))
      out.at[i][...] = fragments.get(tuple(shape), words)

      @pl.when(i < count - 1)
      def _():
        copies.signal(_FREE, 2)

    for number, role in enumerate((put, get)):

      @pl.when(warpgroup == number)
      def _(role=role):
        lax.fori_loop(jnp.int32(0), jnp.int32(count), role, None)

  rows, columns = shape
  return _call(
    body,
    jax.ShapeDtypeStruct(values.shape, jnp.float32),
    [_tiled(rows, 2 * columns), _barrier_words(1)],
    (values,),
    warpgroups=2,
  )


def hand_over(values, *, blocks):
  """Each of `[n, 64]`, from one warpgroup to another, in every block.

  One stores each in a place of its own and signals, the other synchronizes,
  reads and signals back: PTX's example of a producer and a consumer, and no
  more. Without the way back the first could signal twice before the other came,
  which would complete the barrier without it.
  """
  count = values.shape[0]

  def body(values, out, words):
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

    def put(i, _):
      words.at[i][...] = _load(values.at[i], _BY_ROW)
      copies.signal(_READ, 2)
      copies.synchronize(_FREE, 2)

    def get(i, _):
      copies.synchronize(_READ, 2)
      out.at[block, i][...] = _load(words.at[i], _BY_ROW)
      copies.signal(_FREE, 2)

    for number, role in enumerate((put, get)):

      @pl.when(warpgroup == number)
      def _(role=role):
        lax.fori_loop(jnp.int32(0), jnp.int32(count), role, None)

  return _call(
    body,
    jax.ShapeDtypeStruct((blocks, *values.shape), jnp.float32),
    [plgpu.SMEM(values.shape, jnp.float32)],
    (values,),
    warpgroups=2,
    blocks=blocks,
  )


def reduce_columns(values):
  """Maxima, sums and sums again of each `[n, 64, columns]`, a warpgroup each.

  By `reduce_rows`, `reduce_rows` and `sum_rows`: `[3, n, columns]`.
  """
  count, _, columns = values.shape

  def body(values, out, scratch, sum_scratch):
    warpgroup = lax.axis_index("warpgroup")
    own = _load(values.at[warpgroup])
    for number, operation in enumerate(("max", "add")):
      out.at[number, warpgroup][...] = fragments.reduce_rows(
        own, operation, scratch.at[warpgroup]
      )
    out.at[2, warpgroup][...] = reductions.sum_rows(
      own, sum_scratch.at[warpgroup]
    )

  return _call(
    body,
    jax.ShapeDtypeStruct((3, count, columns), jnp.float32),
    [
      plgpu.SMEM((count, fragments.rows_scratch_words(columns)), jnp.float32),
      plgpu.SMEM((count, reductions.SUM_SCRATCH), jnp.float32),
    ],
    (values,),
    warpgroups=count,
  )


def sum_items(addends, row_ids, sizes):
  """`row_sums.sums` of items' 64 addends `[items, 64, width]`, a block each."""

  def body(bounds, addends, row_ids, bits, out, places):
    place = lax.axis_index("block")
    chunk = row_sums.Chunk(bounds, bits, out, places)

    @pl.when(place < chunk.num_items)
    def _():
      item = chunk.first_item + place
      ids = _load(row_ids.at[item], _BY_ROW)
      reductions.record_rows(places, bits, ids, place, 0)
      for tile in range(sizes.width // TILE):
        values = _load(addends.at[item, :, _columns(tile)])
        reductions.store_rows(
          out, place * ROWS, values.astype(jnp.bfloat16), TILE * tile
        )

  def run(bounds, bits):
    return _call(
      body,
      sizes.out_type,
      [],
      (bounds, addends, row_ids, bits),
      blocks=sizes.max_items,
    )

  return row_sums.sums(sizes, run)
