# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sums over a block of threads, and the radix search for the k-th largest."""

from collections.abc import Callable

from pallas_kernels.hopper import simt

# One digit of the search.
_DIGIT_BITS = 11
BINS = 1 << _DIGIT_BITS
# What `Search` writes for all threads to read.
RESULT_WORDS = 4
# Keys of -inf, and how far above it +inf is.
LOWEST = -0x7F800000
_ALL = 2 * 0x7F800000


def ordered(bits: simt.Int) -> simt.Int:
  """Float bits as an integer of the same order; -0.0 and 0.0 are both 0."""
  sign = bits.sign()
  return ((bits & 0x7FFFFFFF) ^ sign) - sign


def float_bits(key: simt.Int) -> simt.Int:
  """The inverse of `ordered`; 0 becomes 0.0."""
  sign = key.sign()
  return ((key ^ sign) - sign) | (sign & 0x80000000)


class BlockSums:
  """Sums over the warps of a block through shared memory.

  Each use has an area of its own, twice over where two uses may follow each
  other with one barrier between: a warp may still read the one while another
  writes the other.
  """

  AREAS = ("tile", "odd_tile", "shrink", "odd_shrink", "search", "append")
  WORDS = len(AREAS) * simt.WARP

  def __init__(self, machine: simt.Machine, scratch: simt.Memory):
    """Clears `scratch`, of `WORDS`."""
    self._machine = machine
    self._scratch = scratch

    def clear(i):
      # The other words are for their warps to write.
      with machine.when((i & (simt.WARP - 1)) >= machine.num_warps):
        scratch.store(i, 0)

    machine.each(self.WORDS, clear)

  def area(self, name: str) -> simt.Int:
    """The first word of an area."""
    return self._machine.int(simt.WARP * self.AREAS.index(name))

  def exchange(self, value: simt.Int, area: simt.Int) -> simt.Int:
    """Gives lane i the value of warp i, or 0; holds a barrier."""
    machine = self._machine
    with machine.when(machine.lane == 0):
      self._scratch.store(machine.warp + area, value)
    machine.barrier()
    return self._scratch.load(machine.lane + area)

  def prefix(
    self, value: simt.Int, area: simt.Int
  ) -> tuple[simt.Int, simt.Int]:
    """Sums a number of each warp; holds a barrier.

    Args:
      value: the same in all lanes.
      area: of this use.

    Returns:
      The sum over lower warps and the sum over all.
    """
    machine = self._machine
    of_lane = self.exchange(value, area)
    lower = (machine.lane < machine.warp).where(of_lane, 0)
    return machine.warp_sum(lower), machine.warp_sum(of_lane)


# Calls its argument with each key of this thread and whether it counts; made
# of `range` or of a loop of the device.
EachKey = Callable[[Callable[[simt.Int, simt.Flag], None]], None]


class Search:
  """Finds the bound of the largest keys, digit by digit."""

  def __init__(
    self,
    machine: simt.Machine,
    sums: BlockSums,
    histogram: simt.Memory,
    result: simt.Memory,
  ):
    """Clears `histogram`, of `BINS` words; `result` has `RESULT_WORDS`."""
    self._machine = machine
    self._sums = sums
    self._histogram = histogram
    self._result = result
    for i in range(0, self._own_bins, 4):
      histogram.store(self._first_bin + i, 0, 0, 0, 0)

  @property
  def _own_bins(self):
    return BINS // self._machine.num_threads

  @property
  def _first_bin(self):
    """Thread 0 has the highest: ranks count from the top."""
    machine = self._machine
    return (machine.num_threads - 1 - machine.thread) * self._own_bins

  def run(
    self,
    each_key: EachKey,
    count: simt.Int,
    wanted: simt.Int,
    floor: simt.Int | int,
    span: simt.Int | int = _ALL,
  ) -> tuple[simt.Int, simt.Int]:
    """Finds which keys are the `wanted` largest.

    Args:
      each_key: visits the keys.
      count: of the keys, more than `wanted`.
      wanted: at least 1.
      floor: below every key.
      span: from `floor` + 1 to the largest key or beyond. The narrower, the
        fewer steps, and the fewer atomics that meet.

    Returns:
      A bound, and how many keys equal to it belong to the largest: those above
      the bound all do.
    """
    machine = self._machine

    def is_open(low, span, wanted, size):
      return (span != 0) & (wanted != size)

    def narrow(low, span, wanted, size):
      del size
      shift = (32 - _DIGIT_BITS - span.leading_zeros()).maximum(0)
      self._count(each_key, low, span, shift)
      digit, wanted, size = self._find(wanted)
      return low + (digit << shift), (machine.int(1) << shift) - 1, wanted, size

    low, _, wanted, size = machine.loop(
      is_open, narrow, machine.int(floor) + 1, span, wanted, count
    )
    takes_all = wanted == size
    return low - takes_all.to_int(), takes_all.where(0, wanted)

  def _count(self, each_key, low, span, shift):
    """Adds the keys `low` to `low + span` to the histogram."""

    def add(key, is_valid):
      distance = key - low
      is_counted = is_valid & distance.is_at_most(span)
      self._histogram.add(distance >> shift, 1, is_counted)

    each_key(add)
    self._machine.barrier()

  def _find(self, wanted):
    """Finds the digit of rank `wanted` from the top; clears the histogram.

    Returns:
      The digit, the rank among the keys of that digit, and their number.
    """
    machine = self._machine
    sizes = []
    for i in range(0, self._own_bins, 4):
      sizes += self._histogram.load_words(self._first_bin + i, 4)
      self._histogram.store(self._first_bin + i, 0, 0, 0, 0)
    own = sum(sizes[1:], sizes[0])
    inclusive = machine.prefix_sum(own)
    lower_warps, _ = self._sums.prefix(
      machine.shuffle(inclusive, simt.WARP - 1), self._sums.area("search")
    )
    above = lower_warps + inclusive - own
    with machine.when((above < wanted) & (wanted <= above + own)):
      for i in reversed(range(self._own_bins)):
        with machine.when((above < wanted) & (wanted <= above + sizes[i])):
          self._result.store(
            0, self._first_bin + i, wanted - above, sizes[i], 0
          )
        above = above + sizes[i]
    machine.barrier()
    return self._result.load_words(0, 4)[:3]
