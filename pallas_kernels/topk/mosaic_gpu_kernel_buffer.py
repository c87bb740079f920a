# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A block's candidates in shared memory: append, search, shrink.

The candidates always stand in the order of their indices: they are placed by a
prefix sum over the block, never by an atomic counter. So which of several equal
scores comes first is known without a search, and nothing depends on which
thread runs first.
"""

from collections.abc import Callable
from typing import NamedTuple

from pallas_kernels.hopper import simt
from pallas_kernels.topk.mosaic_gpu_kernel_search import (
  BlockSums,
  Search,
  ordered,
)

# Scores of one load: 16 bytes.
CHUNK = 4
# Candidates of a thread in one step over the buffer.
_TOGETHER = 4
# Words of a candidate: the score's bits, its index.
WORDS = 2


class Chunk(NamedTuple):
  """Neighbouring scores that a thread has loaded, `CHUNK` of them."""

  first_index: simt.Int
  bits: list[simt.Int]
  is_valid: simt.Flag


class Buffer:
  """The candidates of one row, in order of index."""

  def __init__(
    self,
    machine: simt.Machine,
    entries: simt.Memory,
    capacity: int,
    sums: BlockSums,
    search: Search,
  ):
    """Takes `entries`, of `WORDS` for each of `capacity` candidates."""
    self._machine = machine
    self._capacity = capacity
    self._entries = entries
    self._sums = sums
    self._search = search

  def _load(self, place):
    """Bits and index; of some other candidate where this one is outside."""
    place = place.minimum(self._capacity - 1)
    bits, index = self._entries.load_words(place * WORDS, WORDS)
    return bits, index

  def store(self, place: simt.Int, bits: simt.Int, index: simt.Int) -> None:
    """Stores one candidate."""
    self._entries.store(place * WORDS, bits, index)

  def append(
    self, count: simt.Int, chunks: list[Chunk], floor: simt.Int
  ) -> simt.Int:
    """Appends the scores that lie above a floor; holds a barrier.

    Args:
      count: candidates in the buffer.
      chunks: of this thread. They are in the order of warps, then of chunks,
        then of lanes.
      floor: a float's bits.

    Returns:
      The new count. Another call needs a barrier before it.
    """
    machine = self._machine
    # A bit a score: predicates are few.
    passed = machine.int(0)
    for i, chunk in enumerate(chunks):
      for j, bits in enumerate(chunk.bits):
        has_passed = chunk.is_valid & bits.is_float_above(floor)
        passed = passed | has_passed.where(1 << (CHUNK * i + j), 0)
    befores, totals = self._places_in_warp(passed, len(chunks))
    warp_total = sum(totals[1:], totals[0])
    before, total = self._sums.prefix(warp_total, self._sums.area("append"))
    start = count + before
    for i, chunk in enumerate(chunks):
      place = start + befores[i]
      for j, bits in enumerate(chunk.bits):
        has_passed = (passed & (1 << (CHUNK * i + j))) != 0
        with machine.when(has_passed):
          self.store(place, bits, chunk.first_index + j)
        place = place + has_passed.to_int()
      start = start + totals[i]
    return count + total

  def _places_in_warp(self, passed, num_chunks):
    """For each chunk: candidates of lower lanes, and of all lanes.

    Args:
      passed: `CHUNK` bits a chunk.
      num_chunks: at most four.
    """
    machine = self._machine
    # A byte a chunk: a warp has at most 128 candidates of one.
    packed = _popcounts(passed)
    inclusive = machine.prefix_sum(packed)
    exclusive = inclusive - packed
    last = machine.shuffle(inclusive, simt.WARP - 1)
    return [
      [(x >> 8 * i) & 0xFF for i in range(num_chunks)]
      for x in (exclusive, last)
    ]

  def search(
    self, count: simt.Int, wanted: simt.Int | int, floor: simt.Int
  ) -> tuple[simt.Int, simt.Int]:
    """`Search.run` on the candidates, all above `floor`, after a barrier."""
    machine = self._machine

    def each_key(visit):
      self._each(count, lambda bits, is_valid: visit(ordered(bits), is_valid))

    largest = machine.warp_unsigned_maximum(self._largest(count, floor + 1))
    of_lane = self._sums.exchange(largest, self._sums.area("search"))
    span = machine.warp_unsigned_maximum(of_lane)
    return self._search.run(each_key, count, machine.int(wanted), floor, span)

  def _each(self, count, visit):
    """Visits the bits of all candidates."""
    machine = self._machine

    def step(begin):
      places = [begin + machine.num_threads * i for i in range(_TOGETHER)]
      loaded = [self._load(place)[0] for place in places]
      for place, bits in zip(places, loaded, strict=True):
        visit(bits, place < count)
      return [begin + machine.num_threads * _TOGETHER]

    machine.loop(lambda begin: begin < count, step, machine.thread)

  def _largest(self, count, low):
    """The largest distance of a key of this thread from `low`."""
    machine = self._machine

    def step(begin, largest):
      for i in range(_TOGETHER):
        place = begin + machine.num_threads * i
        distance = ordered(self._load(place)[0]) - low
        largest = largest.unsigned_maximum((place < count).where(distance, 0))
      return begin + machine.num_threads * _TOGETHER, largest

    return machine.loop(
      lambda begin, _: begin < count, step, machine.thread, 0
    )[1]

  def shrink(
    self,
    count: simt.Int,
    bound: simt.Int,
    ties: simt.Int,
    store: Callable[[simt.Int, simt.Int, simt.Int], None],
  ) -> None:
    """Keeps candidates above `bound` and the first `ties` equal to it.

    May store in place: a step reads, holds a barrier, then stores no further
    than it has read.

    Args:
      count: of candidates.
      bound: a key.
      ties: candidates to keep of those equal to the bound.
      store: of a new place, a score's bits and its index.
    """
    machine = self._machine
    areas = self._sums.area("shrink") + self._sums.area("odd_shrink")
    first = machine.warp * (simt.WARP * _TOGETHER) + machine.lane

    def step(begin, area, above, equal):
      found = [
        self._compare(begin + first + simt.WARP * i, count, bound)
        for i in range(_TOGETHER)
      ]
      above, equal = self._keep(found, area, above, equal, ties, store)
      return begin + machine.num_threads * _TOGETHER, areas - area, above, equal

    machine.loop(
      lambda begin, *_: begin < count,
      step,
      0,
      self._sums.area("shrink"),
      0,
      0,
    )

  def _compare(self, place, count, bound):
    """A candidate, and whether it is above and equal to the bound."""
    bits, index = self._load(place)
    key, is_inside = ordered(bits), place < count
    return bits, index, (key > bound) & is_inside, (key == bound) & is_inside

  def _keep(self, found, area, above, equal, ties, store):
    """Stores what is kept of one step's candidates.

    Returns:
      Candidates above and equal so far.
    """
    machine = self._machine
    votes = [
      (machine.ballot(is_above), machine.ballot(is_equal))
      for _, _, is_above, is_equal in found
    ]
    packed = machine.int(0)
    for votes_above, votes_equal in votes:
      packed = packed + votes_above.popcount()
      packed = packed + (votes_equal.popcount() << 16)
    before, total = self._sums.prefix(packed, area)
    lower_lanes = (machine.int(1) << machine.lane) - 1
    warp_above = above + (before & 0xFFFF)
    warp_equal = equal + (before >> 16)
    for (bits, index, is_above, is_equal), (votes_above, votes_equal) in zip(
      found, votes, strict=True
    ):
      my_above = warp_above + (votes_above & lower_lanes).popcount()
      my_equal = warp_equal + (votes_equal & lower_lanes).popcount()
      with machine.when(is_above | (is_equal & (my_equal < ties))):
        store(my_above + my_equal.minimum(ties), bits, index)
      warp_above = warp_above + votes_above.popcount()
      warp_equal = warp_equal + votes_equal.popcount()
    return above + (total & 0xFFFF), equal + (total >> 16)


def _popcounts(x):
  """The number of bits of each of four half-bytes, in four bytes."""
  x = x - ((x >> 1) & 0x5555)
  x = (x & 0x3333) + ((x >> 2) & 0x3333)
  x = (x | (x << 8)) & 0x00FF00FF
  return (x | (x << 4)) & 0x0F0F0F0F
