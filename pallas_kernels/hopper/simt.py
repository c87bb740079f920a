# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A small language of integer threads, for what Pallas cannot say on a GPU.

Pallas has no scatter, no sort, no prefix sum and no shared-memory atomics on
Hopper. A kernel that needs them is written against `Machine`: one 32-bit
register a thread is an `Int`, one predicate a `Flag`, and Python operators
become instructions. Python's `range` unrolls; `when`, `branch` and `loop` are
control flow of the device.

    def add_one(machine, memory):
      with machine.when(machine.thread < 100):
        memory.store(machine.thread, memory.load(machine.thread) + 1)

`inline` runs such a function inside a `plgpu.kernel`, as MLIR. The machine is
abstract, so that the same text also runs without a GPU: tests implement it in
NumPy, warps in random order between barriers, races detected.

Rules, which the test machine enforces: all threads of a block reach the same
`barrier`; all lanes of a warp reach the same vote, shuffle or warp reduction.
And one that MLIR enforces: a value made inside `when` does not leave it,
`branch` and `loop` hand theirs over.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, llvm, nvvm, scf, vector
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

WARP = 32
WARPGROUP = 128
# All lanes of a warp, for instructions that ask which take part.
_ALL_LANES = -1


class Flag:
  """One truth value a thread."""

  __slots__ = ("handle", "machine")

  def __init__(self, machine: Machine, handle: Any):
    self.machine = machine
    self.handle = handle

  def __and__(self, other: Flag) -> Flag:
    return self.machine.combine("and", self, other)

  def __or__(self, other: Flag) -> Flag:
    return self.machine.combine("or", self, other)

  def __bool__(self):
    raise TypeError("a thread's flag is not known in Python: use `when`")

  def where(self, if_true: Int | int, if_false: Int | int) -> Int:
    """`if_true` in threads where this holds, elsewhere `if_false`."""
    machine = self.machine
    return machine.select(self, machine.int(if_true), machine.int(if_false))

  def to_int(self) -> Int:
    """1 or 0."""
    return self.where(1, 0)


class Int:
  """One 32-bit integer a thread.

  Sums and products wrap. `>>` shifts in zeros and `//` is unsigned; the
  comparisons are signed but for `is_below`.
  """

  __slots__ = ("handle", "machine")
  __hash__ = None

  def __init__(self, machine: Machine, handle: Any):
    self.machine = machine
    self.handle = handle

  def _binary(self, operation: str, other: Int | int) -> Int:
    return self.machine.binary(operation, self, self.machine.int(other))

  def _compare(self, operation: str, other: Int | int) -> Flag:
    return self.machine.compare(operation, self, self.machine.int(other))

  def __add__(self, other: Int | int) -> Int:
    return self._binary("add", other)

  __radd__ = __add__

  def __sub__(self, other: Int | int) -> Int:
    return self._binary("subtract", other)

  def __rsub__(self, other: Int | int) -> Int:
    return self.machine.int(other) - self

  def __mul__(self, other: Int | int) -> Int:
    return self._binary("multiply", other)

  __rmul__ = __mul__

  def __floordiv__(self, other: Int | int) -> Int:
    return self._binary("divide", other)

  def __and__(self, other: Int | int) -> Int:
    return self._binary("and", other)

  def __or__(self, other: Int | int) -> Int:
    return self._binary("or", other)

  def __xor__(self, other: Int | int) -> Int:
    return self._binary("xor", other)

  def __lshift__(self, other: Int | int) -> Int:
    return self._binary("shift_left", other)

  def __rshift__(self, other: Int | int) -> Int:
    return self._binary("shift_right", other)

  def sign(self) -> Int:
    """-1 where negative, else 0."""
    return self._binary("shift_right_signed", 31)

  def minimum(self, other: Int | int) -> Int:
    """The lower, signed."""
    return self._binary("minimum", other)

  def maximum(self, other: Int | int) -> Int:
    """The higher, signed."""
    return self._binary("maximum", other)

  def unsigned_maximum(self, other: Int | int) -> Int:
    """The higher, unsigned."""
    return self._binary("unsigned_maximum", other)

  def popcount(self) -> Int:
    """The number of set bits."""
    return self.machine.unary("popcount", self)

  def leading_zeros(self) -> Int:
    """Zero bits above the highest set one; 32 of 0."""
    return self.machine.unary("leading_zeros", self)

  def __lt__(self, other: Int | int) -> Flag:
    return self._compare("less", other)

  def __le__(self, other: Int | int) -> Flag:
    return self._compare("at_most", other)

  def __gt__(self, other: Int | int) -> Flag:
    return self._compare("greater", other)

  def __ge__(self, other: Int | int) -> Flag:
    return self._compare("at_least", other)

  def __eq__(self, other: Int | int) -> Flag:
    return self._compare("equal", other)

  def __ne__(self, other: Int | int) -> Flag:
    return self._compare("unequal", other)

  def is_at_most(self, other: Int | int) -> Flag:
    """Unsigned `<=`."""
    return self._compare("unsigned_at_most", other)

  def is_below(self, other: Int | int) -> Flag:
    """Unsigned `<`: of a signed number it also says that it is not negative."""
    return self._compare("below", other)

  def is_float_above(self, other: Int | int) -> Flag:
    """`>` of the float32 numbers whose bits these are; never true of NaN."""
    return self._compare("float_above", other)


class Memory(abc.ABC):
  """Words of 32 bits that all threads of a block (or more) see."""

  @abc.abstractmethod
  def at(self, steps: Int, stride: int = 1) -> Memory:
    """This memory from word `steps * stride` (64 bits, signed) on."""

  @abc.abstractmethod
  def part(self, begin: int, size: int) -> Memory:
    """`size` words of this memory from `begin` on."""

  @abc.abstractmethod
  def load_words(self, index: Int | int, count: int) -> list[Int]:
    """`count` (1, 2 or 4) consecutive words; `index` is a multiple of it."""

  @abc.abstractmethod
  def store(self, index: Int | int, *words: Int | int) -> None:
    """Stores 1, 2 or 4 words from `index` on, a multiple of their number."""

  @abc.abstractmethod
  def add(self, index: Int, value: int, where: Flag) -> None:
    """Adds atomically in threads where a flag holds. Shared memory only."""

  def load(self, index: Int | int) -> Int:
    """One word."""
    return self.load_words(index, 1)[0]


class Machine(abc.ABC):
  """The threads of one block.

  Attributes:
    num_threads: of the block, a multiple of a warp.
  """

  def __init__(self, num_threads: int):
    self.num_threads = num_threads

  @property
  def num_warps(self) -> int:
    """Warps of the block."""
    return self.num_threads // WARP

  @property
  def lane(self) -> Int:
    """The thread's number in its warp."""
    return self.thread & (WARP - 1)

  @property
  def warp(self) -> Int:
    """The warp's number in its block."""
    return self.thread >> 5

  @property
  @abc.abstractmethod
  def thread(self) -> Int:
    """The thread's number in its block."""

  @abc.abstractmethod
  def int(self, value: Int | int) -> Int:
    """A constant, of 32 bits signed or unsigned; an `Int` stays itself."""

  @abc.abstractmethod
  def unary(self, operation: str, x: Int) -> Int:
    """The result of a `popcount` or `leading_zeros`."""

  @abc.abstractmethod
  def binary(self, operation: str, x: Int, y: Int) -> Int:
    """The result of one of the operations that `Int` names."""

  @abc.abstractmethod
  def compare(self, operation: str, x: Int, y: Int) -> Flag:
    """Whether one of the relations that `Int` names holds."""

  @abc.abstractmethod
  def combine(self, operation: str, x: Flag, y: Flag) -> Flag:
    """`x` "and" or "or" `y`."""

  @abc.abstractmethod
  def select(self, flag: Flag, x: Int, y: Int) -> Int:
    """`x` where `flag` holds, elsewhere `y`."""

  @abc.abstractmethod
  def when(self, flag: Flag) -> contextlib.AbstractContextManager[None]:
    """Runs the body in threads where `flag` holds."""

  @abc.abstractmethod
  def branch(
    self,
    flag: Flag,
    body: Callable[..., Sequence[Int]],
    *carry: Int | int,
    otherwise: Callable[..., Sequence[Int]] = lambda *carry: carry,
  ) -> list[Int]:
    """`body(*carry)` in threads where `flag` holds, elsewhere `otherwise`."""

  @abc.abstractmethod
  def loop(
    self,
    condition: Callable[..., Flag],
    body: Callable[..., Sequence[Int]],
    *carry: Int | int,
  ) -> list[Int]:
    """`carry = body(*carry)` while `condition(*carry)`, thread by thread."""

  @abc.abstractmethod
  def barrier(self) -> None:
    """Waits for all threads of the block; orders their shared memory."""

  @abc.abstractmethod
  def ballot(self, flag: Flag) -> Int:
    """Bit i: the flag of lane i of the warp."""

  @abc.abstractmethod
  def warp_sum(self, x: Int) -> Int:
    """The sum over the warp's lanes, in each."""

  @abc.abstractmethod
  def warp_unsigned_maximum(self, x: Int) -> Int:
    """The largest of the warp's lanes, in each."""

  @abc.abstractmethod
  def shuffle(self, x: Int, lane: int) -> Int:
    """The value of one lane, in each."""

  @abc.abstractmethod
  def prefix_sum(self, x: Int) -> Int:
    """Inclusive sums over the warp's lanes."""

  def each(
    self,
    count: Int | int,
    body: Callable[[Int], None],
  ) -> None:
    """`body(i)` of each i below `count`, by the threads in turn."""

    def step(i):
      body(i)
      return [i + self.num_threads]

    self.loop(lambda i: i < count, step, self.thread)


def inline(
  body: Callable[..., None],
  refs: Sequence[Any],
  scalars: Sequence[Any] = (),
  *,
  num_threads: int,
) -> None:
  """Runs `body(machine, *memories, *ints)` inside a Mosaic GPU kernel.

  Args:
    body: emits the code of one thread.
    refs: 32-bit references in global or shared memory, rows contiguous.
    scalars: int32 scalars, the same in all threads.
    num_threads: of the block: 128 for each Pallas thread.
  """
  types = (plgpu.RefType(),) * len(refs)
  types += (plgpu.Layout.WG_SPLAT,) * len(scalars)

  @plgpu.inline_mgpu(arg_types=types)
  def emit(_, *args):
    machine = _MlirMachine(num_threads)
    memories = [_MlirMemory.of(machine, ref) for ref in args[: len(refs)]]
    ints = [Int(machine, x.registers.item()) for x in args[len(refs) :]]
    body(machine, *memories, *ints)

  emit(*refs, *scalars)


def kernel(
  body: Callable[..., None],
  out_type: Sequence[jax.ShapeDtypeStruct],
  *,
  name: str,
  num_blocks: int,
  num_threads: int,
  shared_words: int,
) -> Callable[..., list[jax.Array]]:
  """A Mosaic GPU kernel that is `body` alone.

  Args:
    body: of a machine, the inputs, the outputs, shared memory and the block's
      number.
    out_type: of the outputs, of 32 bits.
    name: of the kernel.
    num_blocks: of the grid.
    num_threads: of a block, a multiple of 128.
    shared_words: of shared memory.
  """

  def run(*refs):
    block = jax.lax.axis_index("block")
    inline(body, refs, (block,), num_threads=num_threads)

  return plgpu.kernel(
    run,
    out_type=out_type,
    scratch_types=[plgpu.SMEM((shared_words,), jnp.int32)],
    grid=(num_blocks,),
    grid_names=("block",),
    num_threads=num_threads // WARPGROUP,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
    ),
  )


def warpgroup_thread() -> Int:
  """The thread's number in its warpgroup, within inline code.

  Read anew each time: what is computed from it then takes no register between
  two turns of a loop.
  """
  text = "mov.u32 $0, %tid.x;"
  thread = utils.inline_ptx(text, result_types=_i32(), has_side_effects=True)
  return Int(_MlirMachine(WARPGROUP), thread) & (WARPGROUP - 1)


_BINARY = {
  "add": arith.addi,
  "subtract": arith.subi,
  "multiply": arith.muli,
  "divide": arith.divui,
  "and": arith.andi,
  "or": arith.ori,
  "xor": arith.xori,
  "shift_left": arith.shli,
  "shift_right": arith.shrui,
  "shift_right_signed": arith.shrsi,
  "minimum": arith.minsi,
  "maximum": arith.maxsi,
  "unsigned_maximum": arith.maxui,
}
_COMPARE = {
  "less": arith.CmpIPredicate.slt,
  "at_most": arith.CmpIPredicate.sle,
  "greater": arith.CmpIPredicate.sgt,
  "at_least": arith.CmpIPredicate.sge,
  "equal": arith.CmpIPredicate.eq,
  "unequal": arith.CmpIPredicate.ne,
  "below": arith.CmpIPredicate.ult,
  "unsigned_at_most": arith.CmpIPredicate.ule,
}
_UNARY = {"popcount": "popc.b32 $0, $1;", "leading_zeros": "clz.b32 $0, $1;"}


def _i32() -> ir.Type:
  return ir.IntegerType.get_signless(32)


class _MlirMachine(Machine):
  """Emits each instruction where MLIR's insertion point stands."""

  def __init__(self, num_threads):
    super().__init__(num_threads)
    self._thread = Int(self, utils.thread_idx())

  @property
  def thread(self):
    return self._thread

  def int(self, value):
    if isinstance(value, Int):
      return value
    wrapped = (value + (1 << 31)) % (1 << 32) - (1 << 31)
    return Int(self, arith.constant(_i32(), wrapped))

  def unary(self, operation, x):
    return self._ptx(_UNARY[operation], x)

  def binary(self, operation, x, y):
    return Int(self, _BINARY[operation](x.handle, y.handle))

  def compare(self, operation, x, y):
    if operation != "float_above":
      predicate = _COMPARE[operation]
      return Flag(self, arith.cmpi(predicate, x.handle, y.handle))
    x, y = (arith.bitcast(ir.F32Type.get(), z.handle) for z in (x, y))
    return Flag(self, arith.cmpf(arith.CmpFPredicate.OGT, x, y))

  def combine(self, operation, x, y):
    return Flag(self, _BINARY[operation](x.handle, y.handle))

  def select(self, flag, x, y):
    return Int(self, arith.select(flag.handle, x.handle, y.handle))

  @contextlib.contextmanager
  def when(self, flag) -> Iterator[None]:
    with ir.InsertionPoint(scf.IfOp(flag.handle).then_block):
      yield
      scf.yield_([])

  def branch(self, flag, body, *carry, otherwise=lambda *carry: carry):
    carry = [self.int(x) for x in carry]
    types = [x.handle.type for x in carry]
    operation = scf.IfOp(flag.handle, types, has_else=True)
    for block, function in (
      (operation.then_block, body),
      (operation.else_block, otherwise),
    ):
      with ir.InsertionPoint(block):
        scf.yield_([self.int(x).handle for x in function(*carry)])
    return [Int(self, x) for x in operation.results]

  def loop(self, condition, body, *carry):
    handles = [self.int(x).handle for x in carry]
    types = [x.type for x in handles]
    operation = scf.WhileOp(types, handles)
    before = operation.before.blocks.append(*types)
    with ir.InsertionPoint(before):
      carried = [Int(self, x) for x in before.arguments]
      scf.condition(condition(*carried).handle, list(before.arguments))
    after = operation.after.blocks.append(*types)
    with ir.InsertionPoint(after):
      carried = [Int(self, x) for x in after.arguments]
      scf.yield_([self.int(x).handle for x in body(*carried)])
    return [Int(self, x) for x in operation.results]

  def barrier(self):
    gpu.barrier()

  def ballot(self, flag):
    text = "{.reg .pred p; setp.ne.b32 p, $1, 0;"
    text += " vote.sync.ballot.b32 $0, p, 0xffffffff;}"
    return self._ptx(text, flag.to_int(), collective=True)

  def warp_sum(self, x):
    text = "redux.sync.add.s32 $0, $1, 0xffffffff;"
    return self._ptx(text, x, collective=True)

  def warp_unsigned_maximum(self, x):
    text = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    return self._ptx(text, x, collective=True)

  def shuffle(self, x, lane):
    everyone, lane, clamp = (
      self.int(value).handle for value in (_ALL_LANES, lane, WARP - 1)
    )
    kind = nvvm.ShflKind.idx
    return Int(self, nvvm.shfl_sync(everyone, x.handle, lane, clamp, kind))

  def prefix_sum(self, x):
    distance = 1
    while distance < WARP:
      # The predicate says whether that lane exists.
      text = "{.reg .pred p; .reg .b32 y;"
      text += f" shfl.sync.up.b32 y|p, $1, {distance}, 0, 0xffffffff;"
      text += " @!p mov.b32 y, 0; add.s32 $0, y, $1;}"
      x = self._ptx(text, x, collective=True)
      distance *= 2
    return x

  def _ptx(self, text, x, collective=False):
    """One instruction of one operand; a collective one stays where it is."""
    result = utils.inline_ptx(
      text,
      x.handle,
      result_types=_i32(),
      has_side_effects=collective,
      convergent=collective,
    )
    return Int(self, result)


class _MlirMemory(Memory):
  """A pointer of LLVM, to global or shared memory."""

  def __init__(self, machine, pointer):
    self._machine = machine
    self._pointer = pointer

  @classmethod
  def of(cls, machine, ref):
    pointer = utils.memref_ptr(ref)
    if not ir.MemRefType(ref.type).memory_space:
      # Generic addresses would cost every load a look-up of its space.
      pointer = llvm.addrspacecast(
        llvm.PointerType.get(address_space=1), pointer
      )
    return cls(machine, pointer)

  def at(self, steps, stride=1):
    i64 = ir.IntegerType.get_signless(64)
    offset = arith.muli(
      arith.extsi(i64, steps.handle), arith.constant(i64, stride)
    )
    pointer = utils.getelementptr(self._pointer, [offset], _i32())
    return _MlirMemory(self._machine, pointer)

  def part(self, begin, size):
    del size
    pointer = utils.getelementptr(self._pointer, [begin], _i32())
    return _MlirMemory(self._machine, pointer)

  def _element(self, index):
    index = self._machine.int(index).handle
    return utils.getelementptr(self._pointer, [index], _i32())

  def load_words(self, index, count):
    pointer = self._element(index)
    if count == 1:
      return [Int(self._machine, llvm.load(_i32(), pointer))]
    words = llvm.load(
      ir.VectorType.get((count,), _i32()), pointer, alignment=4 * count
    )
    return [
      Int(
        self._machine,
        vector.extract(words, dynamic_position=[], static_position=[i]),
      )
      for i in range(count)
    ]

  def store(self, index, *words):
    handles = [self._machine.int(word).handle for word in words]
    if len(handles) == 1:
      (value,) = handles
    else:
      value = vector.from_elements(
        ir.VectorType.get((len(handles),), _i32()), handles
      )
    llvm.store(value, self._element(index), alignment=4 * len(handles))

  def add(self, index, value, where):
    # With a predicate, where `when` might branch.
    utils.inline_ptx(
      f"red.shared.add.u32 [$0], {value};",
      self._element(index),
      predicate=where.handle,
      has_side_effects=True,
    )
