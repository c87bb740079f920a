# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What both passes over dense attention share: how products are fed.

One operand of the products, 128 rows of all C columns, stays in shared memory
for the length of an item; the other streams past it in blocks of 64 columns.
The thread blocks of a cluster keep different rows and share the stream: each
copies a part of it to all. Two consumer warpgroups of 64 product rows each, one
producer warpgroup.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Rows of either operand, of one consumer's product, and columns of a block.
ROWS = 128
PRODUCT_ROWS = 64
COLUMNS = 64
CONSUMERS = ROWS // PRODUCT_ROWS
LAYOUT = plgpu.Layout.WGMMA
PER_ROW = LAYOUT.reduce(1)
_SWIZZLE = 128
_STAGES = 5
_REGISTERS_OF_CONSUMER, _REGISTERS_OF_PRODUCER = 240, 24


class Barriers(NamedTuple):
  """Of the resident operand, and of the ring's blocks."""

  resident_full: object
  resident_free: object
  stream_full: object
  stream_free: object


class Operands(NamedTuple):
  """Shared memory, in blocks of columns."""

  resident: object
  stream: object
  barriers: Barriers


class Grid(NamedTuple):
  """Thread blocks.

  Attributes:
    clusters: how many.
    members: thread blocks of a cluster.
  """

  clusters: int
  members: int

  @property
  def rows(self) -> int:
    """Resident rows of a cluster."""
    return ROWS * self.members

  def member(self):
    """Number of this thread block in its cluster."""
    return lax.axis_index("member") if self.members > 1 else 0


def scratch(width: int, dtype, grid: Grid) -> Operands:
  """Shared memory for operands of `width` columns."""
  transforms = (
    plgpu.TilingTransform((8, COLUMNS)),
    plgpu.SwizzleTransform(_SWIZZLE),
  )

  def blocks(count):
    return plgpu.SMEM((count, ROWS, COLUMNS), dtype, transforms=transforms)

  return Operands(
    resident=blocks(width // COLUMNS),
    stream=blocks(_STAGES),
    barriers=Barriers(
      resident_full=plgpu.Barrier(num_arrivals=width // COLUMNS),
      resident_free=plgpu.Barrier(num_arrivals=CONSUMERS),
      stream_full=plgpu.Barrier(num_arrivals=1, num_barriers=_STAGES),
      stream_free=_free_barrier(grid),
    ),
  )


def _free_barrier(grid: Grid):
  """The consumers of all of a cluster free a block for all its producers."""
  settings = {"num_arrivals": CONSUMERS, "num_barriers": _STAGES}
  if grid.members == 1:
    return plgpu.Barrier(**settings)
  return plgpu.ClusterBarrier(collective_axes=("member",), **settings)


def call(body, out_type, operands, *, width, dtype, grid: Grid):
  """Runs `body` of the operands' refs, the outputs' and `memory`."""
  cluster = {"cluster": (grid.members,), "cluster_names": ("member",)}
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types={"memory": scratch(width, dtype, grid)},
    grid=(grid.clusters,),
    grid_names=("cluster",),
    **(cluster if grid.members > 1 else {}),
    num_threads=CONSUMERS + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      approx_math=True,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
    ),
  )(*operands)


def run_warpgroups(produce, consume):
  """Gives each warpgroup its part and its registers."""
  warpgroup = lax.axis_index("warpgroup")

  @pl.when(warpgroup == CONSUMERS)
  def _():
    plgpu.set_max_registers(_REGISTERS_OF_PRODUCER, action="decrease")
    produce()

  def consumer(n):
    plgpu.set_max_registers(_REGISTERS_OF_CONSUMER, action="increase")
    consume(n)

  for n in range(CONSUMERS):
    pl.when(warpgroup == n)(functools.partial(consumer, n))


def row_slice(begin):
  """Rows of an operand."""
  return pl.ds(begin, ROWS)


def product_slice(begin):
  """Rows of one consumer's products."""
  return pl.ds(begin, PRODUCT_ROWS)


def product_rows(n: int):
  """Which of an operand's rows are the consumer's."""
  return product_slice(n * PRODUCT_ROWS)


def rows_of(ref, sequence, begin, *head):
  """A function from the first column to 128 rows by 64 columns of `ref`."""

  def block(column):
    return ref.at[sequence, row_slice(begin), *head, pl.ds(column, COLUMNS)]

  return block


def _slot(n):
  return lax.rem(n, jnp.int32(_STAGES))


def load_resident(memory: Operands, rows, item):
  """Copies an item's rows: `rows` is a function of the first column."""

  @pl.when(item > 0)
  def _():
    plgpu.barrier_wait(memory.barriers.resident_free)

  for block in range(memory.resident.shape[0]):
    plgpu.copy_gmem_to_smem(
      rows(block * COLUMNS),
      memory.resident.at[block],
      memory.barriers.resident_full,
    )


def load_stream(memory: Operands, rows, loaded, grid: Grid):
  """Copies rows through the ring; returns the number of blocks loaded."""

  def load(block, loaded):
    slot = _slot(loaded)

    @pl.when(loaded >= _STAGES)
    def _():
      plgpu.barrier_wait(memory.barriers.stream_free.at[slot])

    plgpu.copy_gmem_to_smem(
      rows(block * COLUMNS),
      memory.stream.at[slot],
      memory.barriers.stream_full.at[slot],
      collective_axes="member" if grid.members > 1 else None,
    )
    return loaded + 1

  return lax.fori_loop(0, memory.resident.shape[0], load, loaded)


def drain(memory: Operands, items, loaded):
  """Waits until nothing is in use any more.

  A cluster's memory must outlive what its other members do to it, and the
  interpreter wants each phase seen.
  """

  @pl.when(items > 0)
  def _():
    plgpu.barrier_wait(memory.barriers.resident_free)

  @pl.loop(jnp.maximum(loaded - _STAGES, 0), loaded)
  def _(n):
    plgpu.barrier_wait(memory.barriers.stream_free.at[_slot(n)])


def products(memory: Operands, n, consumed, *, resident_is_rows: bool):
  """Products `[64, 128]` of all columns.

  Args:
    memory: shared memory.
    n: which consumer; its rows are n * 64 and on.
    consumed: blocks that it has taken from the ring.
    resident_is_rows: whether the resident operand has the product's rows, else
      its columns.

  Returns:
    The products, and the blocks taken then.
  """
  blocks = memory.resident.shape[0]
  mine = product_rows(n)

  def release(count):
    plgpu.barrier_arrive(memory.barriers.stream_free.at[_slot(count)])

  def multiply(products_ref):
    for block in range(blocks):
      slot = _slot(consumed + block)
      plgpu.barrier_wait(memory.barriers.stream_full.at[slot])
      resident, stream = memory.resident.at[block], memory.stream.at[slot]
      rows, columns = (
        (resident, stream) if resident_is_rows else (stream, resident)
      )
      plgpu.wgmma(products_ref, rows.at[mine], columns.transpose((1, 0)))
      if block:
        # All but the product just begun.
        plgpu.wgmma_wait(1)
        release(consumed + block - 1)
    result = products_ref[...]
    release(consumed + blocks - 1)
    return result

  result = pl.run_scoped(multiply, plgpu.ACC((PRODUCT_ROWS, ROWS), jnp.float32))
  return result, consumed + blocks


def zeros() -> jax.Array:
  """Products of zero."""
  return plgpu.layout_cast(jnp.zeros((PRODUCT_ROWS, ROWS), jnp.float32), LAYOUT)


def spread(x, axis: int) -> jax.Array:
  """A vector over the rows (axis 0) or columns of products."""
  return lax.broadcast_in_dim(x, (PRODUCT_ROWS, ROWS), (axis,))


def key_numbers(first) -> jax.Array:
  """The key of each product's column."""
  return first + plgpu.broadcasted_iota(
    jnp.int32, (PRODUCT_ROWS, ROWS), 1, layout=LAYOUT
  )
