# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of one row by one block of threads, in one read of the row.

The row streams by in tiles, and what may matter goes through two sieves, both
in order of index. A chunk of four scores of which one is above a floor joins a
queue: few instructions a score, and integer instructions, at half the rate of
the others, are what a fast stream runs out of. When the queue is full, the
scores of its chunks that are above the floor join the buffer of candidates.

When the buffer in turn is full, it shrinks to its k largest and the k-th
largest is the new floor: a later score that equals it has k before it that
win, so ties in bulk end the collecting instead of flooding it. From a floor of
-inf that is exact, and slow at first. So a long row first takes a sample and
starts from a floor that few more than k should pass. A floor that fewer than k
passed costs a second read, from -inf.
"""

import itertools
from typing import NamedTuple

from pallas_kernels.hopper import simt
from pallas_kernels.topk import mosaic_gpu_kernel_source as source
from pallas_kernels.topk.mosaic_gpu_kernel_buffer import (
  CHUNK,
  WORDS,
  Buffer,
  Chunk,
)
from pallas_kernels.topk.mosaic_gpu_kernel_search import (
  BINS,
  LOWEST,
  RESULT_WORDS,
  BlockSums,
  Search,
  float_bits,
  ordered,
)
from pallas_kernels.topk.mosaic_gpu_kernel_source import (
  MINUS_INFINITY,
  Merge,
  Parts,
  Segment,
)


class Plan(NamedTuple):
  """Static sizes.

  Attributes:
    k: indices wanted.
    num_keys: scores from one row's start to the next.
    num_segments: of a row, each with a block of its own.
    num_threads: of a block; a power of two.
    chunks: loads of a thread in one tile, at most four.
    sample_chunks: loads of a thread for the sample.
    drained_chunks: what a thread takes from the queue at once, at most four.
    queue: chunks that the queue holds, more than a tile.
    limit: candidates beyond which the buffer shrinks; at least k.
  """

  k: int
  num_keys: int
  num_segments: int
  num_threads: int
  chunks: int
  sample_chunks: int
  drained_chunks: int
  queue: int
  limit: int

  @property
  def segment_keys(self) -> int:
    """Scores of a segment: whole chunks."""
    return source.width(-(-self.num_keys // self.num_segments))

  @property
  def tile(self) -> int:
    """Chunks of a tile."""
    return self.num_threads * self.chunks

  @property
  def drained(self) -> int:
    """Chunks that the block takes from the queue at once."""
    return self.num_threads * self.drained_chunks

  @property
  def capacity(self) -> int:
    """Candidates that the buffer holds."""
    return self.limit + self.drained * CHUNK

  @property
  def shared(self) -> tuple[int, ...]:
    """Words of each of `Shared`."""
    return (
      WORDS * self.capacity,
      CHUNK * self.queue,
      self.queue,
      BINS,
      BlockSums.WORDS,
      RESULT_WORDS,
      Merge.starts_words(self.num_segments),
    )

  @property
  def shared_words(self) -> int:
    """Of all `Shared`."""
    return sum(self.shared)


class Shared(NamedTuple):
  """A block's shared memory.

  Attributes:
    entries: of the buffer.
    queued_scores: four words a chunk.
    queued_chunks: their numbers.
    histogram: of the search.
    sums: of `BlockSums`.
    result: of the search.
    starts: of `Merge`.
  """

  entries: simt.Memory
  queued_scores: simt.Memory
  queued_chunks: simt.Memory
  histogram: simt.Memory
  sums: simt.Memory
  result: simt.Memory
  starts: simt.Memory

  @classmethod
  def of(cls, plan: Plan, memory: simt.Memory) -> "Shared":
    """Divides `plan.shared_words` of memory."""
    ends = itertools.accumulate(plan.shared)
    return cls(
      *(
        memory.part(end - size, size)
        for end, size in zip(ends, plan.shared, strict=True)
      )
    )


class Block:
  """The threads that select from one row or segment, and their tools."""

  def __init__(self, machine: simt.Machine, plan: Plan, shared: Shared):
    """Clears what must be clear of `shared`."""
    self.machine = machine
    self.plan = plan
    self.shared = shared
    self.sums = BlockSums(machine, shared.sums)
    self.search = Search(machine, self.sums, shared.histogram, shared.result)
    self.buffer = Buffer(
      machine, shared.entries, plan.capacity, self.sums, self.search
    )

  def length(self, lengths: simt.Memory | None, row: simt.Int) -> simt.Int:
    """Of a row."""
    if lengths is None:
      return self.machine.int(self.plan.num_keys)
    return lengths.load(row)


def select_row(
  block: Block,
  scores: simt.Memory,
  lengths: simt.Memory | None,
  parts: Parts | None,
  indices: simt.Memory,
  row: simt.Int,
) -> None:
  """Selects from one row, or from the parts of its segments.

  Args:
    block: that does it.
    scores: `[rows, num_keys]` float32.
    lengths: `[rows]`, or None: whole rows.
    parts: of its segments, or None.
    indices: result, `[rows, k]`.
    row: its number.
  """
  machine, plan = block.machine, block.plan
  length = block.length(lengths, row)
  chunks = Segment(scores, plan.num_keys, row, machine.int(0), length)
  if parts is not None:
    starts, sums = block.shared.starts, block.sums
    chunks = Merge(
      machine, parts, plan.num_segments, plan.k, row, starts, sums, chunks
    )
  floor = _sample(block, chunks)
  count, floor = _Stream(block, chunks).collect(floor)
  indices = indices.at(row, plan.k)

  def store(place, bits, index):
    del bits
    if parts is not None:
      (index,) = machine.branch(
        chunks.is_merged, lambda index: [chunks.sources.load(index)], index
      )
    indices.store(place, index)

  _finish(block, count, floor, store)

  def pad(i):
    with machine.when(i >= count):
      indices.store(i, -1)

  machine.each(plan.k, pad)


def select_part(
  block: Block,
  scores: simt.Memory,
  lengths: simt.Memory | None,
  parts: Parts,
  place: simt.Int,
) -> None:
  """Selects from one segment what may be among the row's k largest.

  All segments start from the floor of one sample of the whole row, so that
  together they find few more than k.

  Args:
    block: that does it.
    scores: `[rows, num_keys]` float32.
    lengths: `[rows]`, or None: whole rows.
    parts: result.
    place: the segment's number, in all rows.
  """
  machine, plan = block.machine, block.plan
  row = place // plan.num_segments
  begin = (place - row * plan.num_segments) * plan.segment_keys
  length = block.length(lengths, row)
  whole = Segment(scores, plan.num_keys, row, machine.int(0), length)
  length = (length - begin).maximum(0).minimum(plan.segment_keys)
  segment = Segment(scores, plan.num_keys, row, begin, length)
  floor = _sample(block, whole)
  is_sampled = floor != LOWEST
  count, floor = _Stream(block, segment).run(floor)
  width = source.width(plan.k)
  values = parts.values.at(place, width)
  sources = parts.sources.at(place, width)

  def store(place, bits, index):
    values.store(place, bits)
    sources.store(place, index + begin)

  _finish(block, count, floor, store)
  count = count.minimum(plan.k)
  with machine.when(machine.thread < ((0 - count) & (CHUNK - 1))):
    values.store(count + machine.thread, MINUS_INFINITY)
  with machine.when(machine.thread == 0):
    parts.counts.store(place, source.pack_count(count, is_sampled))


def _finish(block, count, floor, store):
  """Stores the k largest candidates."""
  block.machine.barrier()
  bound, ties = block.machine.branch(
    count > block.plan.k,
    lambda *_: block.buffer.search(count, block.plan.k, floor),
    LOWEST,
    0,
  )
  block.buffer.shrink(count, bound, ties, store)


def _sample(block, segment):
  """A floor for long rows: few more than k scores should be above it."""
  machine, plan, sums = block.machine, block.plan, block.sums
  num_chunks = plan.num_threads * plan.sample_chunks
  num_scores = num_chunks * CHUNK

  def run(_):
    keys = _sampled_keys(machine, plan, segment)

    def each_key(visit):
      for key in keys:
        visit(key, key > LOWEST)

    # Of the sample, so many should be among the k largest of all...
    expected = machine.int(plan.k * num_scores) // segment.length
    # ... and x + 4 sqrt(x), four standard deviations more, is below this.
    rank = expected + (expected >> 2) + 17
    own = machine.int(0)
    for key in keys:
      own = own + (key > LOWEST).to_int()
    _, valid = sums.prefix(machine.warp_sum(own), sums.area("append"))

    def find(_):
      bound, ties = block.search.run(each_key, valid, rank, LOWEST)
      # Scores equal to the bound pass: they may be all that there are.
      return [bound - ties.minimum(1)]

    return machine.branch(valid > rank, find, LOWEST)

  (floor,) = machine.branch(segment.length > 2 * num_scores, run, LOWEST)
  return floor


def _sampled_keys(machine, plan, segment):
  """Keys of chunks in equal distances; `LOWEST` for NaN."""
  stride = segment.num_chunks // (plan.num_threads * plan.sample_chunks)
  keys = []
  for i in range(plan.sample_chunks):
    chunk = (machine.thread + plan.num_threads * i) * stride
    for bits in segment.mask(chunk, segment.load(chunk)):
      is_valid = bits.is_float_above(MINUS_INFINITY)
      keys.append(is_valid.where(ordered(bits), LOWEST))
  return keys


class _Stream:
  """A block's scores, from the row to the buffer."""

  def __init__(self, block, segment):
    self._machine = block.machine
    self._plan = block.plan
    self._segment = segment
    self._queued_scores = block.shared.queued_scores
    self._queued_chunks = block.shared.queued_chunks
    self._sums = block.sums
    self._buffer = block.buffer

  def collect(self, floor):
    """Leaves at least the k largest scores in the buffer.

    Args:
      floor: to start from.

    Returns:
      The buffer's count and a floor below all of its keys.
    """
    machine, plan = self._machine, self._plan

    def run(floor, count, lowest, is_open):
      del count, lowest, is_open
      count, lowest = self.run(floor)
      failed = (count < plan.k) & (floor != LOWEST)
      return LOWEST, count, lowest, failed.to_int()

    _, count, lowest, _ = machine.loop(
      lambda *carry: carry[-1] != 0, run, floor, 0, LOWEST, 1
    )
    return count, lowest

  def run(self, floor):
    """Streams once: leaves the scores above the floor, or the k largest.

    Args:
      floor: to start from.

    Returns:
      The buffer's count and a floor below all of its keys.
    """
    machine, plan = self._machine, self._plan
    tiles = (self._segment.num_chunks + (plan.tile - 1)) // plan.tile
    # The run before, or the sample, may have ended without one.
    machine.barrier()

    def step(tile, queued, floor, count, ties, *scores):
      # Before this tile's scores are handled: they come while it is.
      following = self._load(tile + 1)

      def handle(*carry):
        return self._handle(tile, tiles, scores, *carry)

      # The first turn only loads.
      queued, floor, count, ties = machine.branch(
        tile >= 0, handle, queued, floor, count, ties
      )
      return tile + 1, queued, floor, count, ties, *following

    nothing = [0] * (CHUNK * plan.chunks)
    _, _, floor, count, ties, *_ = machine.loop(
      lambda tile, *_: tile < tiles, step, -1, 0, floor, 0, 0, *nothing
    )
    # Ties with the floor are in the buffer too.
    return count, floor - ties.minimum(1)

  def _handle(self, tile, tiles, scores, queued, floor, count, ties):
    """What is done with one tile's scores."""
    plan = self._plan
    scores = self._mask_ends(tile, tiles, scores)
    queued = self._sift(tile, queued, floor, scores)
    return self._machine.branch(
      (queued > plan.queue - plan.tile) | (tile + 1 == tiles),
      self._drain,
      queued,
      floor,
      count,
      ties,
    )

  def _chunk(self, tile, i):
    # A warp's chunks are neighbours, so that its candidates are.
    machine, plan = self._machine, self._plan
    first = machine.warp * (simt.WARP * plan.chunks) + machine.lane
    return tile * plan.tile + first + simt.WARP * i

  def _load(self, tile):
    segment = self._segment
    chunks = [self._chunk(tile, i) for i in range(self._plan.chunks)]

    def load(load_chunk):
      return lambda *_: [x for chunk in chunks for x in load_chunk(chunk)]

    return self._machine.branch(
      (tile + 1) * self._plan.tile <= segment.num_chunks,
      load(segment.load),
      *[0] * (CHUNK * self._plan.chunks),
      otherwise=load(segment.load_clamped),
    )

  def _mask_ends(self, tile, tiles, scores):
    def mask(*scores):
      masked = []
      for i in range(self._plan.chunks):
        own = scores[CHUNK * i : CHUNK * (i + 1)]
        masked += self._segment.mask(self._chunk(tile, i), own)
      return masked

    is_end = (tile == 0) | (tile + 1 == tiles)
    return self._machine.branch(is_end, mask, *scores)

  def _sift(self, tile, queued, floor, scores):
    """Queues chunks with a score above the floor; returns their number."""
    machine, plan = self._machine, self._plan
    floor = float_bits(floor)
    passed = []
    for i in range(plan.chunks):
      flags = [
        bits.is_float_above(floor)
        for bits in scores[CHUNK * i : CHUNK * (i + 1)]
      ]
      passed.append((flags[0] | flags[1]) | (flags[2] | flags[3]))
    # A byte for each of the thread's chunks, and 32 lanes of four: 128.
    packed = machine.int(0)
    for i, has_passed in enumerate(passed):
      packed = packed + has_passed.where(1 << 8 * i, 0)
    inclusive = machine.prefix_sum(packed)
    last = machine.shuffle(inclusive, simt.WARP - 1)
    # Each byte gains the sum of those below it.
    places = inclusive - packed + last * 0x01010100
    odd = self._sums.area("odd_tile") - self._sums.area("tile")
    before, total = self._sums.prefix(
      (last * 0x01010101) >> 24, self._sums.area("tile") + (tile & 1) * odd
    )
    start = queued + before
    for i, has_passed in enumerate(passed):
      with machine.when(has_passed):
        place = start + ((places >> 8 * i) & 0xFF)
        own = scores[CHUNK * i : CHUNK * (i + 1)]
        self._queued_scores.store(place * CHUNK, *own)
        self._queued_chunks.store(place, self._chunk(tile, i))
    return queued + total

  def _drain(self, queued, floor, count, ties):
    """Empties the queue into the buffer, which shrinks when it must."""
    machine, plan = self._machine, self._plan

    def step(begin, floor, count, ties):
      # Queued chunks, or the sums of the step before, are being written.
      machine.barrier()
      count = self._buffer.append(
        count, self._queued(begin, queued), float_bits(floor)
      )
      floor, count, ties = machine.branch(
        count > plan.limit, self._shrink, floor, count, ties
      )
      return begin + plan.drained, floor, count, ties

    _, floor, count, ties = machine.loop(
      lambda begin, *_: begin < queued, step, 0, floor, count, ties
    )
    return 0, floor, count, ties

  def _queued(self, begin, queued):
    """The chunks of one step of `_drain`."""
    machine = self._machine
    first = (
      machine.warp * (simt.WARP * self._plan.drained_chunks) + machine.lane
    )
    chunks = []
    for i in range(self._plan.drained_chunks):
      place = begin + first + simt.WARP * i
      inside = place.minimum(self._plan.queue - 1)
      chunks.append(
        Chunk(
          self._segment.index(self._queued_chunks.load(inside)),
          self._queued_scores.load_words(inside * CHUNK, CHUNK),
          place < queued,
        )
      )
    return chunks

  def _shrink(self, floor, count, ties):
    lowest = floor - ties.minimum(1)
    self._machine.barrier()
    floor, ties = self._buffer.search(count, self._plan.k, lowest)
    self._buffer.shrink(count, floor, ties, self._buffer.store)
    return floor, self._plan.k, ties
