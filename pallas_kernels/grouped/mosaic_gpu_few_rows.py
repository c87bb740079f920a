# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The grouped product of a decode step: few rows, so the matrices' bytes count.

A block of threads takes one group and 64 of its output columns, and streams
that part of the group's matrix through shared memory. The tensor cores
multiply it with all rows, 64 at most, for they idle anyway; each row then
takes the product of its own group. JAX's kernel, made for many rows, reads at
0.2 TB/s here, of an H200's 4.3.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

# Rows of the wgmma instruction.
MAX_ROWS = 64
# Output columns of a block; more would leave multiprocessors idle at 4 groups.
COLUMNS = 64
# Rows of a matrix that one copy brings.
_DEPTH = 128
_SLOTS = 6
# Tiles of 8 rows x 128 bytes, as wgmma reads them.
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def grouped_matmul(
  rows: Float[Array, "M E"],
  matrices: Float[Array, "G E F"],
  group_sizes: Int32[Array, " G"],
) -> Float[Array, "M F"]:
  """The products, for M a multiple of 8 up to `MAX_ROWS`.

  Args:
    rows: sorted by group.
    matrices: E a multiple of 128, F of 64.
    group_sizes: rows of each group; rows behind them give no product.
  """
  num_rows, depth = rows.shape
  width = matrices.shape[2]
  slots = min(_SLOTS, depth // _DEPTH)
  kernel = plgpu.kernel(
    functools.partial(_body, num_rows, depth // _DEPTH, slots),
    # All rows of a product, for there is no store of some: float32, which
    # leaves the registers in whole sectors, and little beside the matrix.
    out_type=jax.ShapeDtypeStruct((num_rows, MAX_ROWS, width), jnp.float32),
    scratch_types=[
      plgpu.SMEM((slots, MAX_ROWS, _DEPTH), rows.dtype, transforms=_TRANSFORMS),
      plgpu.SMEM((slots, _DEPTH, COLUMNS), rows.dtype, transforms=_TRANSFORMS),
      plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    ],
    grid=(num_rows, width // COLUMNS),
    grid_names=("row", "column"),
    kernel_name="grouped_matmul_few_rows",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
  )
  groups, starts = _segments(num_rows, group_sizes)
  products = kernel(rows, matrices, groups, starts)
  # Where there is no group nothing was stored.
  own = jnp.where(
    starts[:, None] >= 0, products[starts, jnp.arange(num_rows)], 0
  )
  return own.astype(rows.dtype)


def _segments(num_rows, group_sizes):
  """Each row's group and the first row of that group; -1 for no group."""
  ends = jnp.cumsum(group_sizes)
  row = jnp.arange(num_rows)
  group = jnp.sum(ends <= row[:, None], axis=1)
  is_row = group < len(group_sizes)
  start = jnp.where(is_row, (ends - group_sizes)[group], -1)
  return group.astype(jnp.int32), start.astype(jnp.int32)


def _body(
  num_rows,
  steps,
  slots,
  rows,
  matrices,
  groups,
  starts,
  out,
  rows_smem,
  matrix_smem,
  full,
):
  row = lax.axis_index("row")
  column = lax.axis_index("column") * COLUMNS

  # One block serves all rows of a group: that of its first row.
  @pl.when(starts[row] == row)
  def _():
    group = groups[row]

    def start_copies(step):
      slot = lax.rem(step, jnp.int32(slots))
      depth = pl.ds(step * _DEPTH, _DEPTH)
      plgpu.copy_gmem_to_smem(
        rows.at[:, depth], rows_smem.at[slot, pl.ds(0, num_rows)], full.at[slot]
      )
      plgpu.copy_gmem_to_smem(
        matrices.at[group, depth, pl.ds(column, COLUMNS)],
        matrix_smem.at[slot],
        full.at[slot],
      )

    for step in range(slots):
      start_copies(jnp.int32(step))

    def multiply(accumulator):
      def multiply_step(step, carry):
        slot = lax.rem(step, jnp.int32(slots))
        plgpu.barrier_wait(full.at[slot])
        plgpu.wgmma(accumulator, rows_smem.at[slot], matrix_smem.at[slot])
        plgpu.wgmma_wait(0)

        @pl.when(step + slots < steps)
        def _():
          start_copies(step + slots)

        return carry

      lax.fori_loop(jnp.int32(0), jnp.int32(steps), multiply_step, None)
      return accumulator[...]

    product = pl.run_scoped(
      multiply, plgpu.ACC((MAX_ROWS, COLUMNS), jnp.float32)
    )
    out.at[row, :, pl.ds(column, COLUMNS)][...] = product
