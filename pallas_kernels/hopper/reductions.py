# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pieces of sums across warps, and across the items of `row_sums`.

CUDA-thread code in Mosaic GPU's inline form, for kernels in Lane semantics; it
can't be interpreted.
"""

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, scf, vector
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP = 128
# Of a row, that one thread of `gather_add` sums: 16 bytes of addends.
COLUMNS = 8
# Floats that `sum_rows` exchanges: two of each lane of four warps.
SUM_SCRATCH = 256

# A thread's registers of a product hold, for each 8 columns, two neighbours of
# row `16 warp + lane // 4` and two of the row 8 below (PTX ISA, "wgmma:
# register fragments").
_LANES_A_ROW = 4
_HALF_ROWS = 8
_WORD_BITS = 32
# Of `gather_add`, by one thread.
_LOADS_AT_ONCE = 2

_REF = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT
_PRODUCT = plgpu.Layout.WGMMA


def sum_rows(values: jax.Array, scratch: jax.Ref) -> jax.Array:
  """Sums a product over its rows, across the four warps of a warpgroup.

  Pallas's own sum over this axis has one scratch memory for all warpgroups.

  Args:
    values: float32 [64, columns], layout `Layout.WGMMA`.
    scratch: float32 [`SUM_SCRATCH`] in shared memory, this warpgroup's.

  Returns:
    float32 [columns], layout `Layout.WGMMA.reduce(0)`.
  """

  @plgpu.inline_mgpu(
    arg_types=(_PRODUCT, _REF),
    return_type=plgpu.ShapeDtypeStruct(
      values.shape[1:], values.dtype, layout=_PRODUCT.reduce(0)
    ),
  )
  def add(_, values, scratch):
    return values.reduce("add", 0, scratch)

  return add(values, scratch)


def store_rows(
  rows: jax.Ref, first_row: jax.Array, values: jax.Array, column: jax.Array
):
  """Stores a product in consecutive rows of global memory.

  Args:
    rows: bfloat16 [any, width] in global memory.
    first_row: where the first row of `values` goes, an int32 scalar.
    values: bfloat16 [64, columns], layout `Layout.WGMMA`; columns a multiple
      of 32.
    column: of `rows`, where the first column of `values` goes, an int32
      scalar.
  """
  width = rows.shape[-1]

  @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR, _PRODUCT, _SCALAR))
  def store(_, rows, first_row, values, column):
    lane = arith.andi(utils.thread_idx(), _int32(_LANES_A_ROW - 1))
    row = arith.addi(first_row.registers.item(), _row_of_thread())
    # After the exchange, lane i of four has columns 8 i to 8 i + 7 of 32.
    pointer = _offset(
      _global_pointer(rows),
      _scaled(row, 2 * width),
      _scaled(lane, 16),
      _scaled(column.registers.item(), 2),
    )
    pairs = values.registers.reshape(-1, 2)
    for half in range(2):
      words = [utils.bitcast(pair, _i32()) for pair in pairs[:, half]]
      for first in range(0, len(words), _LANES_A_ROW):
        offset = 2 * width * _HALF_ROWS * half + 16 * first
        # Read once, soon, by others: not to be kept before what is read often.
        utils.inline_ptx(
          f"st.global.cs.v4.b32 [$0 + {offset}], {{$1, $2, $3, $4}};",
          pointer,
          *_transpose(words[first : first + _LANES_A_ROW], lane),
          has_side_effects=True,
        )

  store(rows, jnp.int32(first_row), values, jnp.int32(column))


def _transpose(words, lane):
  """Word i of lane j becomes word j of lane i, among four lanes."""
  for distance in (1, 2):
    is_high = _is_nonzero(arith.andi(lane, _int32(distance)))
    moved = list(words)
    for i in range(len(words)):
      if i & distance:
        continue
      low, high = words[i], words[i + distance]
      received = utils.shfl_bfly(arith.select(is_high, low, high), distance)
      moved[i] = arith.select(is_high, received, low)
      moved[i + distance] = arith.select(is_high, high, received)
    words = moved
  return words


def record_rows(
  places: jax.Ref,
  bits: jax.Ref,
  row_ids: jax.Array,
  item: jax.Array,
  first_place: jax.Array,
):
  """Notes which 64 rows an item has, and where it has each.

  Args:
    places: [items, rows] in global memory, integers of 2 or 4 bytes; is set
      for these rows alone.
    bits: int32 [words, rows] in global memory, zeros at first: bit `item % 32`
      of word `item // 32` is set for each row.
    row_ids: int32 [64], layout `Layout.WGMMA.reduce(1)`; below 0: none.
    item: an int32 scalar.
    first_place: of the first row id, an int32 scalar.
  """
  num_rows = places.shape[-1]
  place_bytes = places.dtype.itemsize

  @plgpu.inline_mgpu(
    arg_types=(_REF, _REF, _PRODUCT.reduce(1), _SCALAR, _SCALAR)
  )
  def record(_, places, bits, row_ids, item, first_place):
    item = item.registers.item()
    place = arith.addi(first_place.registers.item(), _row_of_thread())
    places = _offset(
      _global_pointer(places), _scaled(item, place_bytes * num_rows)
    )
    word = arith.shrui(item, _int32(_WORD_BITS.bit_length() - 1))
    bits = _offset(_global_pointer(bits), _scaled(word, 4 * num_rows))
    bit = arith.shli(_int32(1), arith.andi(item, _int32(_WORD_BITS - 1)))
    lane = arith.andi(utils.thread_idx(), _int32(_LANES_A_ROW - 1))
    is_first_lane = _is_equal(lane, _int32(0))
    for half, row_id in enumerate(row_ids.registers.flat):
      row_id = _element(row_id, 0)
      is_row = arith.cmpi(arith.CmpIPredicate.sge, row_id, _int32(0))
      own_place = arith.addi(place, _int32(_HALF_ROWS * half))
      if place_bytes == 2:
        own_place = arith.trunci(_i16(), own_place)
      for instruction, array, row_bytes, value in (
        (f"st.global.b{8 * place_bytes}", places, place_bytes, own_place),
        ("red.relaxed.gpu.global.or.b32", bits, 4, bit),
      ):
        utils.inline_ptx(
          f"{instruction} [$0], $1;",
          _offset(array, _scaled(row_id, row_bytes)),
          value,
          predicate=arith.andi(is_row, is_first_lane),
          has_side_effects=True,
        )

  record(places, bits, row_ids, jnp.int32(item), jnp.int32(first_place))


def gather_add(
  total: jax.Ref,
  addends: jax.Ref,
  places: jax.Ref,
  bits: jax.Ref,
  first_row: jax.Array,
  rows_an_item: int,
  first_thread: jax.Array,
):
  """Adds to some of `total` all that items have for it, in their order.

  Args:
    total: float32 [any, width] in global memory.
    addends: bfloat16 [items * rows_an_item, width] in global memory.
    places: as `record_rows` wrote it.
    bits: likewise.
    first_row: of `total`, that row id 0 is, an int32 scalar.
    rows_an_item: of `addends`.
    first_thread: number of the warpgroup's first thread, an int32 scalar;
      thread n takes `COLUMNS` columns, the n-th of the rows one after another.
  """
  chunks = total.shape[-1] // COLUMNS
  words, num_rows = bits.shape
  place_bytes = places.dtype.itemsize

  @plgpu.inline_mgpu(arg_types=(*(_REF,) * 4, _SCALAR, _SCALAR))
  def add(_, total, addends, places, bits, first_row, first_thread):
    thread = arith.andi(utils.thread_idx(), _int32(WARPGROUP - 1))
    number = arith.addi(first_thread.registers.item(), thread)
    row = arith.divui(number, _int32(chunks))
    chunk = arith.remui(number, _int32(chunks))
    with utils.when(arith.cmpi(arith.CmpIPredicate.ult, row, _int32(num_rows))):
      total_row = arith.addi(row, first_row.registers.item())
      target = _offset(
        _global_pointer(total),
        _scaled(total_row, 4 * COLUMNS * chunks),
        _scaled(chunk, 4 * COLUMNS),
      )
      places = _offset(_global_pointer(places), _scaled(row, place_bytes))
      bits = _offset(_global_pointer(bits), _scaled(row, 4))
      addends = _offset(_global_pointer(addends), _scaled(chunk, 2 * COLUMNS))

      def mask_of(word):
        return llvm.load(_i32(), _offset(bits, _scaled(word, 4 * num_rows)))

      def source(item):
        place = llvm.load(
          _i16() if place_bytes == 2 else _i32(),
          _offset(places, _scaled(item, place_bytes * num_rows)),
        )
        if place_bytes == 2:
          place = arith.extui(_i32(), place)
        return _offset(
          addends,
          _scaled(item, 2 * COLUMNS * chunks * rows_an_item),
          _scaled(place, 2 * COLUMNS * chunks),
        )

      def add_word(word, *sums):
        first_item = arith.muli(word, _int32(_WORD_BITS))
        return _add_at_bits(
          mask_of(word), lambda bit: source(arith.addi(first_item, bit)), sums
        )

      (seen,) = _for_each_word(
        words, lambda word, seen: (arith.ori(seen, mask_of(word)),), _int32(0)
      )
      # Among many keys few have a query in a chunk: the others' sums, of 4
      # bytes a column, are neither read nor written.
      with utils.when(_is_nonzero(seen)):
        sums = _for_each_word(words, add_word, *_load_floats(target))
        _store_floats(target, sums)

  add(
    total, addends, places, bits, jnp.int32(first_row), jnp.int32(first_thread)
  )


def _for_each_word(words, body, *carry):
  """`carry = body(word, *carry)` for each of the words' numbers."""
  _, *carry = _while(
    lambda word, *_: arith.cmpi(arith.CmpIPredicate.ult, word, _int32(words)),
    lambda word, *carry: (arith.addi(word, _int32(1)), *body(word, *carry)),
    _int32(0),
    *carry,
  )
  return carry


def _add_at_bits(mask, source, sums):
  """Adds what is at `source(bit)` for each set bit, from the lowest on.

  Loads for a few bits at a time start before any of them ends.
  """

  def step(mask, *sums):
    sources = []
    for _ in range(_LOADS_AT_ONCE):
      lowest = arith.andi(mask, arith.subi(_int32(0), mask))
      zeros = utils.inline_ptx("clz.b32 $0, $1;", lowest, result_types=_i32())
      bit = arith.subi(_int32(_WORD_BITS - 1), zeros)
      # Of no bit at all: 0, where anything may stand, for it is not used.
      sources.append((lowest, source(arith.maxsi(bit, _int32(0)))))
      mask = arith.xori(mask, lowest)
    loads = [_load_if(flag, pointer) for flag, pointer in sources]
    for words in loads:
      sums = _add_bfloat16(sums, words)
    return (mask, *sums)

  _, *sums = _while(lambda mask, *_: _is_nonzero(mask), step, mask, *sums)
  return sums


def _load_if(flag, pointer):
  """Four words at `pointer`, or zeros where `flag` is 0."""
  registers = [f"${i}" for i in range(COLUMNS // 2)]
  clears = "".join(f" @!loads mov.b32 {x}, 0;" for x in registers)
  return utils.inline_ptx(
    "{.reg .pred loads; setp.ne.b32 loads, $5, 0;"
    f" @loads ld.global.cs.v4.b32 {{{', '.join(registers)}}}, [$4];"
    f"{clears}}}",
    pointer,
    flag,
    result_types=[_i32()] * len(registers),
    has_side_effects=True,
  )


def _add_bfloat16(sums, words):
  # A bfloat16 is the upper half of a float32.
  halves = (
    half
    for word in words
    for half in (
      arith.shli(word, _int32(16)),
      arith.andi(word, _int32(-(1 << 16))),
    )
  )
  return [
    arith.addf(x, arith.bitcast(ir.F32Type.get(), half))
    for x, half in zip(sums, halves, strict=True)
  ]


def _while(condition, body, *carry):
  types = [x.type for x in carry]
  operation = scf.WhileOp(types, list(carry))
  before = operation.before.blocks.append(*types)
  with ir.InsertionPoint(before):
    scf.condition(condition(*before.arguments), list(before.arguments))
  after = operation.after.blocks.append(*types)
  with ir.InsertionPoint(after):
    scf.yield_(list(body(*after.arguments)))
  return list(operation.results)


def _float_vector():
  return ir.VectorType.get((4,), ir.F32Type.get())


def _load_floats(pointer):
  vectors = [
    llvm.load(_float_vector(), _offset(pointer, _int32(4 * i)), alignment=16)
    for i in range(0, COLUMNS, 4)
  ]
  return [_element(x, i) for x in vectors for i in range(4)]


def _store_floats(pointer, values):
  for i in range(0, COLUMNS, 4):
    llvm.store(
      vector.from_elements(_float_vector(), values[i : i + 4]),
      _offset(pointer, _int32(4 * i)),
      alignment=16,
    )


def _row_of_thread():
  """The first of a thread's two rows of a product."""
  thread = arith.andi(utils.thread_idx(), _int32(WARPGROUP - 1))
  lane = arith.andi(thread, _int32(31))
  return arith.addi(
    arith.muli(arith.shrui(thread, _int32(5)), _int32(2 * _HALF_ROWS)),
    arith.divui(lane, _int32(_LANES_A_ROW)),
  )


def _global_pointer(ref):
  space = llvm.PointerType.get(address_space=1)
  return llvm.addrspacecast(space, utils.memref_ptr(ref))


def _offset(pointer, *offsets):
  """The pointer so many bytes further."""
  byte = ir.IntegerType.get_signless(8)
  for offset in offsets:
    pointer = utils.getelementptr(pointer, [offset], byte)
  return pointer


def _scaled(number, factor):
  """`number * factor` in 64 bits."""
  i64 = ir.IntegerType.get_signless(64)
  return arith.muli(arith.extsi(i64, number), arith.constant(i64, factor))


def _element(register, index):
  return vector.extract(register, dynamic_position=[], static_position=[index])


def _is_equal(x, y):
  return arith.cmpi(arith.CmpIPredicate.eq, x, y)


def _is_nonzero(x):
  return arith.cmpi(arith.CmpIPredicate.ne, x, _int32(0))


def _int32(value):
  return arith.constant(_i32(), value)


def _i16():
  return ir.IntegerType.get_signless(16)


def _i32():
  return ir.IntegerType.get_signless(32)
