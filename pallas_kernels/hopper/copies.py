# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Copies of single rows into wgmma's shared-memory form, and their barriers.

Hopper's copy engine moves boxes, and Pallas has no copy of scattered rows: the
16-byte `cp.async` of each thread does it (7.2 TB/s of 1152-byte rows on an
H200, from a table of 75 MB). What follows is CUDA-thread code in Mosaic GPU's
inline form, for kernels in Lane semantics; it can't be interpreted.

A Pallas barrier can't enter inline code, so the copies arrive at barriers of
their own: `BARRIER_WORDS` int32 of shared memory each. Such a barrier has no
phase counter: who waits for phase p = 0, 1, 2... passes `p % 2`, and must wait
for every phase, or a barrier two phases ahead looks like one that is behind.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, llvm, nvvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

# Of a shared-memory array of 2-byte elements that wgmma reads: tiles of 8 rows
# x 128 bytes, row-major, 16-byte chunks of a row permuted by its number mod 8.
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Columns of a tile.
TILE = 64
BARRIER_WORDS = 2
WARPGROUP = 128

_CHUNK_BYTES = 16
_ROW_BYTES = 128
_TILE_BYTES = 1024
# Threads that share a row of a tile, and the rows of one pass.
_ROW_THREADS = _ROW_BYTES // _CHUNK_BYTES
_PASS_ROWS = WARPGROUP // _ROW_THREADS
# Each row is nine lines of 128 bytes: a prefetch of 256 loses 10%. The rows
# are read again and again, what else passes through the cache is not: to keep
# them longest gains sparse attention 2 to 3%.
_PREFETCH = ".L2::128B"
_CACHE_POLICY = "createpolicy.fractional.L2::evict_last.b64 $0, 1.0;"
_WAIT_NANOSECONDS = 10_000_000

_REF = plgpu.RefType()
_TILED_REF = plgpu.RefType(TRANSFORMS)
_SCALAR = plgpu.Layout.WG_SPLAT


def initialize_barriers(
  words: jax.Ref, arrivals: Sequence[int], *, first: int = 0
):
  """Makes barriers of shared memory. Every thread of the block must call it.

  Args:
    words: int32 in shared memory; barrier i is words 2 i and 2 i + 1.
    arrivals: of each barrier's phase. A gather's is `WARPGROUP`.
    first: the first barrier's number.
  """

  @plgpu.inline_mgpu(arg_types=(_REF,))
  def initialize(_, words):
    is_first = arith.cmpi(
      arith.CmpIPredicate.eq, utils.thread_idx(), _constant(0)
    )
    with utils.when(is_first):
      for number, count in enumerate(arrivals, first):
        utils.inline_ptx(
          f"mbarrier.init.shared.b64 [$0], {count};",
          _barrier(words, number),
          has_side_effects=True,
        )
    gpu.barrier()

  initialize(words)


def wait(words: jax.Ref, barrier: jax.Array, parity: jax.Array):
  """Waits for a phase of copies, as a warpgroup that then runs wgmma on them.

  Args:
    words: as given to `initialize_barriers`.
    barrier: its number, an int32 scalar.
    parity: 0 for phases 0, 2, 4...; 1 for the others.
  """

  @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR, _SCALAR))
  def wait_parity(_, words, barrier, parity):
    nvvm.mbarrier_try_wait_parity(
      _barrier(words, barrier.registers.item()),
      parity.registers.item(),
      _constant(_WAIT_NANOSECONDS),
    )
    _fence()

  wait_parity(words, jnp.int32(barrier), jnp.int32(parity))


def load_indices(
  indices: jax.Ref, start: jax.Array, rows: int, mask: int | None = None
) -> jax.Array:
  """Reads the indices of a block's rows, each where its copies will start.

  Args:
    indices: int32 in global memory, of any shape.
    start: of the block in `indices` as one row, an int32 scalar.
    rows: of the block, a multiple of 16.
    mask: int32, the bits of a word that are its index, the sign among them;
      None: all.

  Returns:
    What `start_row_copies` takes: `rows / 16` registers a thread.
  """
  passes = rows // _PASS_ROWS
  layout = _indices_layout(rows)

  @plgpu.inline_mgpu(
    arg_types=(_REF, _SCALAR),
    return_type=plgpu.ShapeDtypeStruct(
      (passes * WARPGROUP,), jnp.int32, layout=layout
    ),
  )
  def load(_, indices, start):
    row = arith.addi(start.registers.item(), _row_of_thread())
    first = utils.getelementptr(_global_pointer(indices), [row], _i32())
    registers = np.empty((passes,), dtype=object)
    for i in range(passes):
      word = llvm.load(
        ir.VectorType.get((1,), _i32()),
        utils.getelementptr(first, [i * _PASS_ROWS], _i32()),
      )
      if mask is not None:
        word = arith.andi(word, vector.broadcast(word.type, _constant(mask)))
      registers[i] = word
    return mgpu.FragmentedArray(
      _registers=registers, _layout=layout.to_mgpu(), _is_signed=True
    )

  return load(indices, jnp.int32(start))


def start_row_copies(
  table: jax.Ref,
  first_row: jax.Array,
  num_rows: int,
  indices: jax.Array,
  destination: jax.Ref,
  *,
  column_tiles: tuple[int, int],
  to_tile: int | None = None,
  is_kept: bool = True,
):
  """Starts copies of rows, or of some of their columns, as one warpgroup.

  Args:
    table: in global memory, `[any, width]`, a row of whole tiles of 128 bytes:
      64 elements of 2 bytes, or 128 of 1, which wgmma can't read as they lie.
    first_row: added to each index, an int32 scalar.
    num_rows: an index is cut to `num_rows - 1`; a negative one gives zeros,
      and nothing is read for it.
    indices: of `load_indices`, by the same warpgroup.
    destination: `[rows, width]` in shared memory with `TRANSFORMS`.
    column_tiles: first and last (exclusive) tile of a row of `table`.
    to_tile: where the first of them goes in `destination`; None: to the same.
    is_kept: whether the cache keeps these rows longest.
  """
  shift = 0 if to_tile is None else to_tile - column_tiles[0]
  rows = indices.shape[0] // WARPGROUP * _PASS_ROWS

  @plgpu.inline_mgpu(
    arg_types=(_REF, _SCALAR, _indices_layout(rows), _TILED_REF)
  )
  def start(_, table, first_row, indices, destination):
    row_bytes = _row_bytes(table)
    chunk = arith.andi(_thread(), _constant(_ROW_THREADS - 1))
    source = _byte_pointer(
      _global_pointer(table),
      arith.extui(_i64(), arith.muli(chunk, _constant(_CHUNK_BYTES))),
    )
    first = _first_chunk(destination)
    hints, policy = _PREFETCH, ()
    if is_kept:
      hints = f".L2::cache_hint{_PREFETCH}"
      policy = (utils.inline_ptx(_CACHE_POLICY, result_types=_i64()),)
      first = _opaque_pointer(first)
    targets = _chunk_pointers(first, destination, rows)
    places = _places(indices, first_row, num_rows, _CHUNK_BYTES)
    for (index, num_bytes), to_row in zip(places, targets, strict=True):
      from_row = _row_pointer(source, index, row_bytes)
      for tile in range(*column_tiles):
        utils.inline_ptx(
          f"cp.async.cg.shared.global{hints}"
          f" [$0 + {(tile + shift) * _TILE_BYTES}],"
          f" [$1 + {tile * _ROW_BYTES}],"
          f" {_CHUNK_BYTES}, $2{', $3' if policy else ''};",
          to_row,
          from_row,
          num_bytes,
          *policy,
          has_side_effects=True,
        )

  start(table, jnp.int32(first_row), indices, destination)


def start_scale_copies(
  scales: jax.Ref,
  first_row: jax.Array,
  num_rows: int,
  indices: jax.Array,
  destination: jax.Ref,
  *,
  to_tile: int,
):
  """Starts copies of rows of 4 or 8 bytes, each to its row's chunk 0 of a tile.

  Args:
    scales: in global memory, `[any, width]`.
    first_row: as in `start_row_copies`.
    num_rows: as in `start_row_copies`.
    indices: as in `start_row_copies`.
    destination: as in `start_row_copies`.
    to_tile: of `destination`.
  """
  rows = indices.shape[0] // WARPGROUP * _PASS_ROWS

  @plgpu.inline_mgpu(
    arg_types=(_REF, _SCALAR, _indices_layout(rows), _TILED_REF)
  )
  def start(_, scales, first_row, indices, destination):
    row_bytes = _row_bytes(scales)
    chunk = arith.andi(_thread(), _constant(_ROW_THREADS - 1))
    is_copier = arith.cmpi(arith.CmpIPredicate.eq, chunk, _constant(0))
    source = _global_pointer(scales)
    targets = _chunk_pointers(_first_chunk(destination), destination, rows)
    places = _places(indices, first_row, num_rows, row_bytes)
    for (index, num_bytes), to_row in zip(places, targets, strict=True):
      utils.inline_ptx(
        f"cp.async.ca.shared.global [$0 + {to_tile * _TILE_BYTES}], [$1],"
        f" {row_bytes}, $2;",
        to_row,
        _row_pointer(source, index, row_bytes),
        num_bytes,
        predicate=is_copier,
        has_side_effects=True,
      )

  start(scales, jnp.int32(first_row), indices, destination)


def start_word_copies(
  source: jax.Ref, start: jax.Array, destination: jax.Ref, offset: jax.Array
):
  """Starts copies of 64 words of 4 bytes, as one warpgroup.

  Args:
    source: 4-byte elements in global memory, of any shape.
    start: of the words in `source` as one row, an int32 scalar.
    destination: 4-byte elements in shared memory, untiled.
    offset: of the words in `destination` as one row, an int32 scalar.
  """

  @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR, _REF, _SCALAR))
  def copy(_, source, start, destination, offset):
    is_copier = arith.cmpi(arith.CmpIPredicate.ult, _thread(), _constant(TILE))
    with utils.when(is_copier):
      utils.inline_ptx(
        "cp.async.ca.shared.global [$0], [$1], 4;",
        utils.getelementptr(
          utils.memref_ptr(destination),
          [arith.addi(offset.registers.item(), _thread())],
          _i32(),
        ),
        utils.getelementptr(
          _global_pointer(source),
          [arith.addi(start.registers.item(), _thread())],
          _i32(),
        ),
        has_side_effects=True,
      )

  copy(source, jnp.int32(start), destination, jnp.int32(offset))


def arrive_when_copied(words: jax.Ref, barrier: jax.Array):
  """Arrives once this thread's earlier copies are done; `WARPGROUP` arrivals.

  Args:
    words: as given to `initialize_barriers`.
    barrier: its number, an int32 scalar.
  """

  @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR))
  def arrive(_, words, barrier):
    utils.inline_ptx(
      "cp.async.mbarrier.arrive.noinc.shared.b64 [$0];",
      _barrier(words, barrier.registers.item()),
      has_side_effects=True,
    )

  arrive(words, jnp.int32(barrier))


def commit():
  """Makes a group of this thread's copies since the last; see `wait_groups`."""

  @plgpu.inline_mgpu()
  def end_group(_):
    utils.inline_ptx("cp.async.commit_group;", has_side_effects=True)

  end_group()


def wait_groups(pending: int):
  """Waits for all of a warp's groups of copies but the last `pending` ones."""

  @plgpu.inline_mgpu()
  def wait_for_all(_):
    utils.inline_ptx(f"cp.async.wait_group {pending};", has_side_effects=True)
    utils.inline_ptx(
      "bar.warp.sync 0xffffffff;", has_side_effects=True, convergent=True
    )

  wait_for_all()


def arrive(words: jax.Ref, barrier: jax.Array):
  """Arrives with what this thread stored; `WARPGROUP` arrivals.

  Args:
    words: as given to `initialize_barriers`.
    barrier: its number, an int32 scalar.
  """

  @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR))
  def arrive_after_stores(_, words, barrier):
    _fence()
    utils.inline_ptx(
      "mbarrier.arrive.shared.b64 _, [$0];",
      _barrier(words, barrier.registers.item()),
      has_side_effects=True,
    )

  arrive_after_stores(words, jnp.int32(barrier))


def synchronize(name: int, warpgroups: int):
  """Waits until that many warpgroups synchronize or signal with this name.

  What they stored to shared memory before is then visible to the caller and to
  its wgmma.

  Args:
    name: 8 to 15 (Mosaic GPU uses the hardware's lower ones).
    warpgroups: that take part, the caller among them.
  """
  _named_barrier("sync", name, warpgroups)


def signal(name: int, warpgroups: int):
  """Takes part in a `synchronize` of other warpgroups without waiting."""
  _named_barrier("arrive", name, warpgroups)


def opaque(value: int) -> jax.Array:
  """An int32 scalar that the compiler takes for a different one each time.

  Where an address is known to be the same in each turn of a loop, ptxas moves
  wgmma's descriptors in front of the loop, more of them than registers.
  """

  @plgpu.inline_mgpu(
    arg_types=(_SCALAR,),
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR),
  )
  def move(_, value):
    moved = utils.inline_ptx(
      "mov.u32 $0, $1;",
      value.registers.item(),
      result_types=_i32(),
      has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(moved, (), is_signed=True)

  return move(jnp.int32(value))


def _named_barrier(operation, name, warpgroups):
  @plgpu.inline_mgpu()
  def barrier(_):
    _fence()
    utils.inline_ptx(
      f"bar.{operation} {name}, {warpgroups * WARPGROUP};",
      has_side_effects=True,
      convergent=True,
    )

  barrier()


def _fence():
  """Orders this thread's view of shared memory before wgmma's and TMA's."""
  utils.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)


def _first_chunk(destination):
  """Where a thread's 16-byte chunk of its first row is, of the first tile.

  A row has 8 threads.
  """
  row = _row_of_thread()
  row_in_tile = arith.andi(row, _constant(7))
  chunk = arith.andi(_thread(), _constant(_ROW_THREADS - 1))
  return _byte_pointer(
    utils.memref_ptr(destination),
    _sum(
      arith.muli(
        arith.shrui(row, _constant(3)),
        _constant(_row_tiles(destination) * _TILE_BYTES),
      ),
      arith.muli(row_in_tile, _constant(_ROW_BYTES)),
      arith.muli(arith.xori(chunk, row_in_tile), _constant(_CHUNK_BYTES)),
    ),
  )


def _chunk_pointers(first, destination, rows):
  """The chunks of a thread's rows, which are 16 apart.

  The permutation of chunks depends on the row alone: every tile and pass is a
  constant further.
  """
  pass_bytes = (_PASS_ROWS // 8) * _row_tiles(destination) * _TILE_BYTES
  for i in range(rows // _PASS_ROWS):
    yield _byte_pointer(first, i * pass_bytes)


def _row_tiles(destination):
  return ir.MemRefType(destination.type).shape[1]


def _opaque_pointer(pointer):
  """The same shared address, in which ptxas sees no part that threads share.

  ptxas 13.0 moves that part into a uniform register of the instruction. In a
  copy with a cache policy, which is a uniform register too, nothing then sets
  the two: an illegal instruction. What a shuffle of different values returns
  has no such part.
  """
  lane = arith.andi(_thread(), _constant(31))
  address = utils.inline_ptx(
    "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
    llvm.ptrtoint(_i32(), pointer),
    lane,
    result_types=_i32(),
    has_side_effects=True,
    convergent=True,
  )
  return llvm.inttoptr(pointer.type, address)


def _places(indices, first_row, num_rows, num_bytes):
  """A thread's rows: their numbers in the table, and the bytes to read."""
  for register in indices.registers.flat:
    index = vector.extract(register, dynamic_position=[], static_position=[0])
    is_row = arith.cmpi(arith.CmpIPredicate.sge, index, _constant(0))
    # A copy of 0 bytes fills its place with zeros.
    read = arith.select(is_row, _constant(num_bytes), _constant(0))
    index = arith.minsi(
      arith.maxsi(index, _constant(0)), _constant(num_rows - 1)
    )
    yield arith.addi(index, first_row.registers.item()), read


def _row_bytes(table):
  memref = ir.MemRefType(table.type)
  return memref.shape[-1] * utils.bitwidth(memref.element_type) // 8


def _row_pointer(source, index, row_bytes):
  return _byte_pointer(
    source,
    arith.muli(arith.extui(_i64(), index), arith.constant(_i64(), row_bytes)),
  )


def _indices_layout(rows):
  return plgpu.Layout.WG_STRIDED((rows // _PASS_ROWS * WARPGROUP,), 1)


def _barrier(words, number):
  return utils.getelementptr(utils.memref_ptr(words), [number], _i64())


def _thread():
  """Of the warpgroup."""
  return arith.andi(utils.thread_idx(), _constant(WARPGROUP - 1))


def _row_of_thread():
  return arith.shrui(_thread(), _constant(_ROW_THREADS.bit_length() - 1))


def _global_pointer(ref):
  space = llvm.PointerType.get(address_space=1)
  return llvm.addrspacecast(space, utils.memref_ptr(ref))


def _byte_pointer(pointer, offset):
  return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _sum(*terms):
  total = terms[0]
  for term in terms[1:]:
    total = arith.addi(total, term)
  return total


def _constant(value):
  return arith.constant(_i32(), value)


def _i32():
  return ir.IntegerType.get_signless(32)


def _i64():
  return ir.IntegerType.get_signless(64)
