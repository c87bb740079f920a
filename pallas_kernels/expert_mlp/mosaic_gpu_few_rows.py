# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The experts of a decode step: few rows, so the matrices' bytes count.

Two kernels, for gate and up together and for down. A block of threads takes
one expert and 64 output columns, and streams that part of the expert's
matrices through shared memory. The tensor cores multiply it with all rows, 64
at most, for they idle anyway; each row then takes the product of its own
experts. Sorting and grouping rows took longer than the products, and JAX's
grouped kernel, made for many rows, reads at 0.2 TB/s here, of an H200's 4.3.
The shared expert has blocks of its own beside the others': alone it would leave
most multiprocessors idle.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.expert_mlp import reference
from pallas_kernels.expert_mlp import shared as shared_lib
from pallas_kernels.hopper import chip

# Rows of the wgmma instruction.
MAX_ROWS = 64
# Output columns of a block; more would leave multiprocessors idle at 4 experts.
_COLUMNS = 64
# Rows of a matrix that one copy brings.
_DEPTH = 128
# Bytes of shared memory for the copies in flight; the rest is the result's.
_RING_BYTES = 192 << 10
# Tiles of 8 rows x 128 bytes, as wgmma reads them. A copy moves whole ones: if
# the array has fewer rows than one, the others become 0.
_TILE_ROWS = 8
_TRANSFORMS = (
  plgpu.TilingTransform((_TILE_ROWS, 64)),
  plgpu.SwizzleTransform(128),
)


def expert_mlp(
  rows: Float[Array, "M E"],
  experts: Int32[Array, "M J"],
  weights: Float32[Array, "M J"],
  gate: Float[Array, "G E F"],
  up: Float[Array, "G E F"],
  down: Float[Array, "G F E"],
  shared: shared_lib.SharedExpert | None = None,
) -> Float[Array, "M E"]:
  """See `api.expert_mlp`; M up to `MAX_ROWS`, E and F multiples of 128."""
  num_rows, num_choices = experts.shape
  if num_rows > _TILE_ROWS:
    rows = jnp.pad(rows, ((0, -num_rows % _TILE_ROWS), (0, 0)))
  matrices = (gate, up, down)
  if num_rows == 1:
    outputs = _outputs(rows, experts[0], matrices, shared)
    routed = outputs[None, :num_choices, 0]
    return _total(routed, weights, outputs[num_choices:, :1])
  # The first choice of an expert stands for all: one block serves them.
  experts = experts.reshape(-1)
  leaders = jnp.argmax(experts == experts[:, None], axis=1)
  is_leader = leaders == jnp.arange(len(experts))
  outputs = _outputs(rows, jnp.where(is_leader, experts, -1), matrices, shared)
  token = jnp.arange(len(experts)) // num_choices
  routed = outputs[leaders, token].reshape(*weights.shape, -1)
  return _total(routed, weights, outputs[len(experts) :, :num_rows])


def _total(routed, weights, common):
  """The weighted sum, and `common` [n, M, E], which each row gets whole."""
  total = reference.weighted_sum(routed, weights)
  if not len(common):
    return total
  return total + common.sum(axis=0, dtype=jnp.float32).astype(total.dtype)


def _outputs(rows, experts, matrices, shared):
  """All rows' [R + n, M, E] from `experts` [R] and n shared; -1: undefined."""
  gate, up, down = matrices
  wide, narrow, count = (), (), 0
  if shared is not None:
    wide, narrow = (shared.gate, shared.up), (shared.down,)
    count = len(shared.down) // down.shape[1]
  inner = _products(rows[None], (gate, up), wide, count, experts, _gated)
  return _products(inner, (down,), narrow, count, experts, lambda x: x)


def _gated(gate, up):
  return gate / (1 + jnp.exp(-gate)) * up


def _products(rows, matrices, shared, num_shared, experts, combine):
  """`combine` of the products of rows with their block's expert's matrices.

  Args:
    rows: [1 or R + n, M, E], one for all choices or one for each; M a multiple
      of 8 or less.
    matrices: arrays [G, E, F].
    shared: for each an array [E, n F] or [n E, F], or none at all.
    num_shared: n, the experts of `shared`.
    experts: [R]; -1 gets no product.
    combine: of float32 products.

  Returns:
    [R + n, M, F], M rounded up to 8; undefined where there is no expert.
  """
  num_choices, depth = len(experts) + num_shared, rows.shape[2]
  num_rows = max(rows.shape[1], _TILE_ROWS)
  width = matrices[0].shape[2]
  grid = (num_choices, width // _COLUMNS)
  slot_bytes = (MAX_ROWS + len(matrices) * _COLUMNS) * _DEPTH * 2
  slots = min(_ring_bytes(math.prod(grid)) // slot_bytes, depth // _DEPTH)
  kernel = plgpu.kernel(
    functools.partial(
      _body,
      slots=slots,
      steps=depth // _DEPTH,
      num_matrices=len(matrices),
      num_shared=num_shared,
      combine=combine,
    ),
    out_type=jax.ShapeDtypeStruct((num_choices, num_rows, width), rows.dtype),
    scratch_types=[
      plgpu.SMEM((slots, MAX_ROWS, _DEPTH), rows.dtype, transforms=_TRANSFORMS),
      *(
        plgpu.SMEM(
          (slots, _DEPTH, _COLUMNS), rows.dtype, transforms=_TRANSFORMS
        )
        for _ in matrices
      ),
      plgpu.SMEM((MAX_ROWS, _COLUMNS), rows.dtype, transforms=_TRANSFORMS),
      plgpu.Barrier(num_arrivals=1 + len(matrices), num_barriers=slots),
    ],
    grid=grid,
    grid_names=("choice", "column"),
    kernel_name="expert_mlp_few_rows",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
  )
  return kernel(rows, *matrices, *shared, experts)


def _ring_bytes(num_blocks):
  """Half, for two blocks a multiprocessor, where that spares a second wave."""
  multiprocessors = chip.chip().num_multiprocessors
  fits_two = multiprocessors < num_blocks <= 2 * multiprocessors
  return _RING_BYTES // 2 if fits_two else _RING_BYTES


def _body(rows, *refs, slots, steps, num_matrices, num_shared, combine):
  num_operands = num_matrices * (2 if num_shared else 1)
  matrices, shared = refs[:num_matrices], refs[num_matrices:num_operands]
  experts, out, rows_smem = refs[num_operands : num_operands + 3]
  *matrix_smems, out_smem, full = refs[num_operands + 3 :]
  choice = lax.axis_index("choice")
  column = lax.axis_index("column") * _COLUMNS
  columns = pl.ds(column, _COLUMNS)
  num_rows, width = out.shape[1:]
  # From 0, which JAX may not see: it refuses what leaves the array.
  whole_tiles = pl.ds(0 * choice, num_rows)
  own_rows = rows.at[0 if len(rows) == 1 else choice]

  num_routed = len(experts)
  part = choice - num_routed
  is_shared = part >= 0
  expert = experts[jnp.minimum(choice, num_routed - 1)]

  def start_copies(step):
    slot = lax.rem(step, jnp.int32(slots))
    start = step * _DEPTH
    depth = pl.ds(start, _DEPTH)
    plgpu.copy_gmem_to_smem(
      own_rows.at[whole_tiles, depth],
      rows_smem.at[slot, pl.ds(0, num_rows)],
      full.at[slot],
    )

    def copy(sources):
      for source, smem in zip(sources, matrix_smems, strict=True):
        plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])

    if not num_shared:
      copy([matrix.at[expert, depth, columns] for matrix in matrices])
      return

    @pl.when(is_shared)
    def _():
      copy([_tile(x, part, start, column, steps, width) for x in shared])

    @pl.when(~is_shared)
    def _():
      copy([matrix.at[expert, depth, columns] for matrix in matrices])

  @pl.when(is_shared | (expert >= 0))
  def _():
    for step in range(slots):
      start_copies(jnp.int32(step))
    products = _multiply(
      start_copies, rows_smem, matrix_smems, full, slots, steps
    )
    out_smem[...] = combine(*products).astype(out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      out_smem.at[pl.ds(0, num_rows)], out.at[choice, :, columns]
    )
    plgpu.wait_smem_to_gmem(0)


def _tile(matrix, part, start, column, steps, width):
  """A tile of one shared expert: its part of the columns, or of the rows."""
  depth = steps * _DEPTH
  if len(matrix) == depth:
    column = part * width + column
  else:
    start = part * depth + start
  return matrix.at[pl.ds(start, _DEPTH), pl.ds(column, _COLUMNS)]


def _multiply(start_copies, rows_smem, matrix_smems, full, slots, steps):
  """Products of the rows with each matrix, added up over the depth."""

  def run(*accumulators):
    def multiply_step(step, carry):
      slot = lax.rem(step, jnp.int32(slots))
      plgpu.barrier_wait(full.at[slot])
      for accumulator, smem in zip(accumulators, matrix_smems, strict=True):
        plgpu.wgmma(accumulator, rows_smem.at[slot], smem.at[slot])
      plgpu.wgmma_wait(0)

      @pl.when(step + slots < steps)
      def _():
        start_copies(step + slots)

      return carry

    lax.fori_loop(jnp.int32(0), jnp.int32(steps), multiply_step, None)
    return [accumulator[...] for accumulator in accumulators]

  accumulator = plgpu.ACC((MAX_ROWS, _COLUMNS), jnp.float32)
  return pl.run_scoped(run, *[accumulator] * len(matrix_smems))
