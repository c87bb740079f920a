# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a block's scores come from, in numbered chunks of four."""

from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.hopper import simt
from pallas_kernels.topk.mosaic_gpu_kernel_buffer import CHUNK
from pallas_kernels.topk.mosaic_gpu_kernel_search import BlockSums

MINUS_INFINITY = 0xFF800000
# Above every chunk's number.
_FAR = 0x7FFFFFFF
# A part's count and, above it, whether it started from a sample's floor.
_SAMPLED_BIT = 30


class Segment:
  """Neighbouring scores of one row.

  A row may start at any float; loads are of 16 aligned bytes. The ones at the
  ends may reach outside the segment: that is masked, and an aligned load that
  holds a byte of an array never leaves its memory page.

  Attributes:
    length: scores.
    num_chunks: that hold them.
  """

  def __init__(
    self,
    scores: simt.Memory,
    num_keys: int,
    row: simt.Int,
    begin: simt.Int,
    length: simt.Int,
  ):
    """Takes `length` scores of a row of `num_keys`, from `begin` on."""
    self._head = (row * num_keys + begin) & (CHUNK - 1)
    self._window = scores.at(row, num_keys).at(begin - self._head)
    self.length = length
    self.num_chunks = (self._head + length + (CHUNK - 1)) >> 2

  def load(self, chunk: simt.Int) -> list[simt.Int]:
    """The bits of a chunk's scores."""
    return self._window.load_words(chunk * CHUNK, CHUNK)

  def load_clamped(self, chunk: simt.Int) -> list[simt.Int]:
    """Like `load`; some other chunk where this one is outside."""
    return self.load(chunk.minimum((self.num_chunks - 1).maximum(0)))

  def index(self, chunk: simt.Int) -> simt.Int:
    """Of a chunk's first score, in the segment; may be negative."""
    return chunk * CHUNK - self._head

  def mask(self, chunk: simt.Int, scores: Sequence[simt.Int]) -> list[simt.Int]:
    """Puts -inf for what lies outside the segment."""
    index = self.index(chunk)
    return [
      (index + j).is_below(self.length).where(bits, MINUS_INFINITY)
      for j, bits in enumerate(scores)
    ]


class Parts(NamedTuple):
  """What the blocks of a row's segments leave for the one that merges them.

  Attributes:
    values: `[rows, segments, width]` float32: the scores found, in order of
      index, and -inf up to the next chunk.
    sources: their indices in the row.
    counts: `[rows, segments]`, of `pack_count`.
  """

  values: simt.Memory
  sources: simt.Memory
  counts: simt.Memory


def width(k: int) -> int:
  """Of a segment's part: whole chunks."""
  return -(-k // CHUNK) * CHUNK


def pack_count(count: simt.Int, is_sampled: simt.Flag) -> simt.Int:
  """A part's number of scores, and whether a sample's floor kept others out."""
  return count | is_sampled.where(1 << _SAMPLED_BIT, 0)


class Merge:
  """The parts of one row, or the row itself where they hold too little.

  A part holds whole chunks, so chunks are numbered through all parts; the
  first number of each part lies in shared memory.

  Attributes:
    is_merged: whether it is the parts.
    length: scores, with those of -inf.
    num_chunks: that hold them.
  """

  def __init__(
    self,
    machine: simt.Machine,
    parts: Parts,
    num_parts: int,
    k: int,
    row: simt.Int,
    starts: simt.Memory,
    sums: BlockSums,
    plain: Segment,
  ):
    """Fills `starts`, of `starts_words(num_parts)`; holds barriers.

    Args:
      machine: of at least `num_parts` threads.
      parts: of all rows.
      num_parts: of a row.
      k: indices wanted.
      row: its number.
      starts: shared memory.
      sums: of the block.
      plain: the row itself.
    """
    self._machine = machine
    self._width = width(k)
    self._num_parts = num_parts
    self._starts = starts
    self._values = parts.values.at(row, num_parts * self._width)
    self.sources = parts.sources.at(row, num_parts * self._width)
    self._plain = plain
    is_part = machine.thread < num_parts
    word = parts.counts.at(row, num_parts).load(
      is_part.where(machine.thread, 0)
    )
    word = is_part.where(word, 0)
    count = word & ((1 << _SAMPLED_BIT) - 1)
    num_chunks = self._fill_starts((count + (CHUNK - 1)) >> 2, sums)
    _, found = sums.prefix(machine.warp_sum(count), sums.area("search"))
    _, sampled = sums.prefix(
      machine.warp_sum(word >> _SAMPLED_BIT), sums.area("shrink")
    )
    self.is_merged = (found >= k) | (sampled == 0)
    self.num_chunks = self.is_merged.where(num_chunks, plain.num_chunks)
    self.length = self.is_merged.where(num_chunks * CHUNK, plain.length)

  @classmethod
  def starts_words(cls, num_parts: int) -> int:
    """A power of two, for the search."""
    return max(4, 1 << (num_parts - 1).bit_length())

  def _fill_starts(self, own, sums):
    """Sums the parts' chunks; thread i has those of part i."""
    machine = self._machine
    inclusive = machine.prefix_sum(own)
    lower_warps, total = sums.prefix(
      machine.shuffle(inclusive, simt.WARP - 1), sums.area("append")
    )
    start = lower_warps + inclusive - own

    def fill(i):
      # Thread i has its own; the loop's other turns are behind the last part.
      is_part = (i == machine.thread) & (i < self._num_parts)
      self._starts.store(i, is_part.where(start, _FAR))

    machine.each(self.starts_words(self._num_parts), fill)
    return total

  def _place(self, chunk):
    """Where a chunk lies among all parts, in chunks."""
    machine = self._machine
    part, start = machine.int(0), machine.int(0)
    step = self.starts_words(self._num_parts) // 2
    while step:
      candidate = self._starts.load(part + step)
      is_at = candidate <= chunk
      part = is_at.where(part + step, part)
      start = is_at.where(candidate, start)
      step //= 2
    return part * (self._width // CHUNK) + chunk - start

  def _choose(self, merged, plain):
    """One of two functions' lists of four."""
    return self._machine.branch(
      self.is_merged,
      lambda *_: merged(),
      *[0] * CHUNK,
      otherwise=lambda *_: plain(),
    )

  def load(self, chunk: simt.Int) -> list[simt.Int]:
    """The bits of a chunk's scores."""
    return self._choose(
      lambda: self._values.load_words(self._place(chunk) * CHUNK, CHUNK),
      lambda: self._plain.load(chunk),
    )

  def load_clamped(self, chunk: simt.Int) -> list[simt.Int]:
    """Like `load`; some other chunk where this one is outside."""
    return self.load(chunk.minimum((self.num_chunks - 1).maximum(0)))

  def index(self, chunk: simt.Int) -> simt.Int:
    """Of a chunk's first score, in the row or among all parts."""
    (index,) = self._machine.branch(
      self.is_merged,
      lambda *_: [self._place(chunk) * CHUNK],
      0,
      otherwise=lambda *_: [self._plain.index(chunk)],
    )
    return index

  def mask(self, chunk: simt.Int, scores: Sequence[simt.Int]) -> list[simt.Int]:
    """Puts -inf for what lies outside."""
    is_inside = chunk < self.num_chunks
    return self._choose(
      lambda: [is_inside.where(bits, MINUS_INFINITY) for bits in scores],
      lambda: self._plain.mask(chunk, scores),
    )
