# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs kernels written against `hopper.simt` in NumPy, and finds their races.

Each warp runs by itself from barrier to barrier, its 32 lanes in lock step
under a mask; which warp runs next is random. What a GPU leaves undefined is an
error here: a barrier or a vote that some threads do not reach, an index out of
bounds or misaligned, and words that one thread writes and another touches with
no barrier between.
"""

import contextlib
import inspect
import threading

import numpy as np

from pallas_kernels.hopper import simt


class SimtError(Exception):
  """A kernel did what a GPU leaves undefined."""


def run_block(body, memories, ints=(), *, num_threads, seed):
  """Runs `body(machine, *memories, *ints)` for all warps of one block.

  Args:
    body: written against `simt.Machine`.
    memories: `Array`s.
    ints: numbers, the same in all threads.
    num_threads: of the block.
    seed: of the order in which warps run.

  Raises:
    SimtError: of the first warp that failed.
  """
  warps = _Block(num_threads // simt.WARP, np.random.default_rng(seed))
  for memory in memories:
    if memory is not None:
      memory.begin(warps)

  def warp(number):
    machine = Machine(num_threads, number, warps)
    handles = [memory and _Memory(machine, memory) for memory in memories]
    body(machine, *handles, *(machine.int(x) for x in ints))

  warps.run(warp)


class _Block:
  """Hands the one right to run from warp to warp."""

  def __init__(self, num_warps, rng):
    self.epoch = 0
    self._rng = rng
    self._resume = [threading.Event() for _ in range(num_warps)]
    self._paused = threading.Event()
    self._waiting = set()
    self._error = None

  def run(self, warp):
    threads = [
      threading.Thread(target=self._run_warp, args=(warp, number), daemon=True)
      for number in range(len(self._resume))
    ]
    for thread in threads:
      thread.start()
    running = set(range(len(threads)))
    while running and self._error is None:
      self._waiting.clear()
      for number in self._rng.permutation(sorted(running)):
        self._step(number)
        if number not in self._waiting:
          running.discard(number)
        if self._error is not None:
          break
      self.epoch += 1
      if self._waiting and len(self._waiting) < len(threads):
        self._error = SimtError("a barrier that not all warps reach")
    if self._error is not None:
      # Lets the others end.
      for event in self._resume:
        event.set()
    for thread in threads:
      thread.join()
    if self._error is not None:
      raise self._error

  def _step(self, number):
    self._paused.clear()
    self._resume[number].set()
    self._paused.wait()

  def _run_warp(self, warp, number):
    try:
      self._pause(number)
      with np.errstate(over="ignore", invalid="ignore"):
        warp(number)
    except Exception as error:
      self._error = self._error or error
    self._paused.set()

  def _pause(self, number):
    self._resume[number].wait()
    self._resume[number].clear()
    if self._error is not None:
      raise SimtError("another warp failed")

  def wait(self, number):
    self._waiting.add(number)
    self._paused.set()
    self._pause(number)


def caller():
  """File and line of the kernel that calls the caller's caller."""
  frame = inspect.currentframe().f_back.f_back
  return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Array:
  """Words of memory, and who touched them since the last barrier."""

  def __init__(self, words, is_shared=False):
    """Takes a NumPy array of 32-bit values; results are seen in it."""
    self.words = words.reshape(-1).view(np.int32)
    self.is_shared = is_shared

  @classmethod
  def shared(cls, words):
    """Shared memory, garbage at first."""
    garbage = np.random.default_rng(words).integers(-(2**31), 2**31, words)
    return cls(garbage.astype(np.int32), is_shared=True)

  def begin(self, block):
    self._block = block
    size = self.words.size
    # The last access of each kind: its epoch, and its thread or -1 for some.
    self._epochs = {kind: np.full(size, -1) for kind in _KINDS}
    self._threads = {kind: np.full(size, -1) for kind in _KINDS}

  def touch(self, kind, indices, threads):
    """Records an access; raises if it races with one before it."""
    epoch = self._block.epoch
    for other in _KINDS:
      if kind == other and kind != "write":
        continue
      same_epoch = self._epochs[other][indices] == epoch
      races = same_epoch & (self._threads[other][indices] != threads)
      if races.any():
        word = indices[races][0]
        raise SimtError(f"race on word {word}: {kind} after {other}")
    epochs, owners = self._epochs[kind], self._threads[kind]
    is_shared = (epochs[indices] == epoch) & (owners[indices] != threads)
    epochs[indices] = epoch
    owners[indices] = threads
    # Lanes of this access that met: one of them is the owner now.
    have_met = owners[indices] != threads
    if kind == "write" and have_met.any():
      raise SimtError("two lanes write one word")
    owners[indices[is_shared | have_met]] = -1


_KINDS = ("read", "write", "atomic")


class Machine(simt.Machine):
  """One warp: a handle is an array of its 32 lanes."""

  def __init__(self, num_threads, number, warps):
    super().__init__(num_threads)
    self._number = number
    self._warps = warps
    self.threads = number * simt.WARP + np.arange(simt.WARP, dtype=np.int32)
    self.mask = np.ones(simt.WARP, bool)

  @property
  def thread(self):
    return simt.Int(self, self.threads)

  def int(self, value):
    if isinstance(value, simt.Int):
      return value
    if not -(2**31) <= value < 2**32:
      raise SimtError(f"{value} has more than 32 bits")
    return simt.Int(self, np.full(simt.WARP, value).astype(np.int32))

  def unary(self, operation, x):
    function = {
      "popcount": np.bitwise_count,
      "leading_zeros": _leading_zeros,
    }[operation]
    return self._int(function(x.handle.view(np.uint32)))

  def binary(self, operation, x, y):
    return self._int(_BINARY[operation](x.handle, y.handle))

  def compare(self, operation, x, y):
    return simt.Flag(self, _COMPARE[operation](x.handle, y.handle))

  def combine(self, operation, x, y):
    return simt.Flag(self, _BINARY[operation](x.handle, y.handle))

  def select(self, flag, x, y):
    return self._int(np.where(flag.handle, x.handle, y.handle))

  def _int(self, values):
    return simt.Int(self, values.astype(np.int32))

  @contextlib.contextmanager
  def _masked(self, mask):
    outer, self.mask = self.mask, self.mask & mask
    try:
      yield
    finally:
      self.mask = outer

  @contextlib.contextmanager
  def when(self, flag):
    # A body cannot be left out of a `with`: memory ignores lanes masked off.
    with self._masked(flag.handle):
      yield

  def branch(self, flag, body, *carry, otherwise=lambda *carry: carry):
    carry = [self.int(x) for x in carry]
    result = carry
    for mask, function in ((flag.handle, body), (~flag.handle, otherwise)):
      with self._masked(mask):
        # Lanes that do not run would meet barriers and votes.
        if self.mask.any():
          result = self._merge(function(*carry), result)
    return result

  def loop(self, condition, body, *carry):
    carry = [self.int(x) for x in carry]
    running = self.mask
    while True:
      with self._masked(running):
        running = self.mask & condition(*carry).handle
      if not running.any():
        return carry
      with self._masked(running):
        carry = self._merge(body(*carry), carry)

  def _merge(self, new, old):
    new = [self.int(x) for x in new]
    if len(new) != len(old):
      raise SimtError(f"{len(old)} values went in, {len(new)} came out")
    return [
      self._int(np.where(self.mask, x.handle, y.handle))
      for x, y in zip(new, old, strict=True)
    ]

  def barrier(self):
    if not self.mask.any():
      return
    self._check_together("barrier")
    self._warps.wait(self._number)

  def _check_together(self, what):
    if self.mask.any() and not self.mask.all():
      raise SimtError(f"only some lanes reach a {what}")

  def ballot(self, flag):
    self._check_together("vote")
    bits = np.sum(
      flag.handle.astype(np.uint64) << np.arange(32, dtype=np.uint64)
    )
    return self.int(int(bits))

  def warp_sum(self, x):
    self._check_together("sum")
    return self._int(np.full(simt.WARP, x.handle.sum(dtype=np.int32)))

  def warp_unsigned_maximum(self, x):
    self._check_together("maximum")
    return self.int(int(x.handle.view(np.uint32).max()))

  def shuffle(self, x, lane):
    self._check_together("shuffle")
    return self._int(np.full(simt.WARP, x.handle[lane]))

  def prefix_sum(self, x):
    self._check_together("prefix sum")
    return self._int(x.handle.cumsum(dtype=np.int32))


class _Memory(simt.Memory):
  """An `Array` from some word of it on, which may differ by lane."""

  def __init__(self, machine, array, offset=0, bounds=None):
    self._machine = machine
    self._array = array
    self._offset = offset
    self._begin, self._end = bounds or (0, array.words.size)

  def at(self, steps, stride=1):
    offset = self._offset + steps.handle.astype(np.int64) * stride
    bounds = self._begin, self._end
    return _Memory(self._machine, self._array, offset, bounds)

  def part(self, begin, size):
    offset = self._offset + begin
    bounds = np.min(offset), np.max(offset) + size
    return _Memory(self._machine, self._array, offset, bounds)

  def _indices(self, index, count):
    """Of the lanes that run, `[lanes, count]`."""
    index = self._machine.int(index).handle
    first = (self._offset + index.astype(np.int64))[self._machine.mask]
    if (first % count).any():
      raise SimtError(f"{count} words at a time, misaligned")
    return first[:, None] + np.arange(count)

  def _touch(self, kind, indices):
    threads = np.repeat(
      self._machine.threads[self._machine.mask], indices.shape[1]
    )
    self._array.touch(kind, indices.reshape(-1), threads)

  def load_words(self, index, count):
    machine, words = self._machine, self._array.words
    indices = self._indices(index, count)
    is_inside = (indices >= self._begin) & (indices < self._end)
    # Aligned words around an array's end exist; they hold anything.
    if not is_inside.any(axis=1).all():
      raise SimtError("a load out of bounds")
    indices = np.where(is_inside, indices, indices[:, ::-1])
    if self._array.is_shared:
      self._touch("read", indices)
    loaded = np.full((simt.WARP, count), _GARBAGE, np.int32)
    loaded[machine.mask] = np.where(
      is_inside, words[np.where(is_inside, indices, 0)], _GARBAGE
    )
    return [simt.Int(machine, loaded[:, i].copy()) for i in range(count)]

  def store(self, index, *values):
    indices = self._indices(index, len(values))
    self._check_inside(indices)
    self._touch("write", indices)
    values = [self._machine.int(x).handle for x in values]
    self._array.words[indices] = np.stack(values, 1)[self._machine.mask]

  def add(self, index, value, where):
    if not self._array.is_shared:
      raise SimtError("an atomic on global memory")
    with self._machine.when(where):
      indices = self._indices(index, 1)
      self._check_inside(indices)
      self._touch("atomic", indices)
    np.add.at(self._array.words, indices[:, 0], value)

  def _check_inside(self, indices):
    if ((indices < self._begin) | (indices >= self._end)).any():
      raise SimtError("a store out of bounds")


# A NaN, should it be taken for a score.
_GARBAGE = 0x7FC0DEAD


def _unsigned(function):
  return lambda x, y: function(x.view(np.uint32), y.view(np.uint32))


def _leading_zeros(x):
  return 32 - np.ceil(np.log2(x.astype(np.float64) + 1)).astype(np.int32)


def _shift(function):
  """PTX and MLIR differ beyond 31 bits: not allowed."""

  def checked(x, y):
    if ((y < 0) | (y > 31)).any():
      raise SimtError("a shift by 32 bits or more")
    return function(x, y)

  return checked


_BINARY = {
  "add": np.add,
  "subtract": np.subtract,
  "multiply": np.multiply,
  "divide": _unsigned(np.floor_divide),
  "and": np.bitwise_and,
  "or": np.bitwise_or,
  "xor": np.bitwise_xor,
  "shift_left": _shift(np.left_shift),
  "shift_right": _shift(_unsigned(np.right_shift)),
  "shift_right_signed": _shift(np.right_shift),
  "minimum": np.minimum,
  "maximum": np.maximum,
  "unsigned_maximum": _unsigned(np.maximum),
}
_COMPARE = {
  "less": np.less,
  "at_most": np.less_equal,
  "greater": np.greater,
  "at_least": np.greater_equal,
  "equal": np.equal,
  "unequal": np.not_equal,
  "below": _unsigned(np.less),
  "unsigned_at_most": _unsigned(np.less_equal),
  "float_above": lambda x, y: x.view(np.float32) > y.view(np.float32),
}
