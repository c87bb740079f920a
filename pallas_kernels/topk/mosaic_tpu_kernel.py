# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernel of `top_k`: copies, order, search and ties."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from pallas_kernels.topk import mosaic_tpu_bitmap as bitmap
from pallas_kernels.topk import mosaic_tpu_lists as lists

_SUBLANES, _LANES = bitmap.SUBLANES, bitmap.LANES
# Keys: the bits of float32, as integers of the same order. From -inf down
# nothing may be selected.
_INFINITY = 0x7F800000
_LOWEST = 1 - _INFINITY
# Registers that a pass over keys reads without a loop, and those of counts kept
# apart, for one alone would wait for its last addition.
_CHUNK = 128
_SUMS = 4
# Registers of output searched in step, a gather's latency being that of many
# instructions. By v5e's schedule a quarter of them take 1.2 times as long.
_SLOTS_TOGETHER = 32
# First bounds, below the largest key: a few powers of two.
_FIRST_STEPS = (1 << 24, 1 << 22)


class Rounds(NamedTuple):
  """How often what the data decides is done, for the cost tool.

  It cannot know when a loop ends, so it does each so many times, whatever the
  result.

  Attributes:
    passes: of the search for the bound.
    visits: of 128 blocks, by `bitmap.store_slots`.
    slots: of output, of each sublane.
  """

  passes: int | None = None
  visits: int | None = None
  slots: int | None = None


class Scratch(NamedTuple):
  """The kernel's memory, for R rows (or 8 segments of one) at a time.

  Attributes:
    row: `[R, H * 128 * 128]` float32 scores.
    keys: `[32 * C, R, 128]` their integers, by blocks of 128.
    lists: `[8 * G, R, 128]` the largest of groups of keys (`lists`), or None.
    words: `[4, H, R, 128]` the bitmap of those chosen.
    before: `[H, R, 128]` how many are chosen before each block.
    slots: `[K / 128, R, 128]` indices on their way out.
    semaphores: of the copies, one a part of the row.
  """

  row: Any
  keys: Any
  lists: Any
  words: Any
  before: Any
  slots: Any
  semaphores: Any


def select_rows(
  scores_hbm,
  ends_ref,
  out_ref,
  scratch,
  *,
  k,
  segments,
  shortest,
  rounds,
):
  """One group of rows: copy, order, search, select, store.

  Args:
    scores_hbm: `[B, S]` float32.
    ends_ref: `[R, 1]` keys of each sublane that count.
    out_ref: `[1, R / segments, K]` ascending indices, -1 behind.
    scratch: a `Scratch`.
    k: indices wanted a row.
    segments: sublanes that share a row: 1 or 8.
    shortest: the least of `ends_ref`, where that is known; else None.
    rounds: a `Rounds`; of Nones, where the data decides.
  """
  step, steps = pl.program_id(1), pl.num_programs(1)
  group = pl.program_id(0) * steps + step

  @pl.when(step == 0)
  def _():
    _start_all(scores_hbm, scratch, group, segments)

  _order(scores_hbm, ends_ref, scratch, group, segments, shortest)

  num_chosen = _choose(scratch, k, segments, rounds.passes)
  # The segments of a row have few each.
  slots_together = (
    _SLOTS_TOGETHER // segments
    if segments > 1
    else _SLOTS_TOGETHER * _SUBLANES // scratch.slots.shape[1]
  )
  bitmap.store_slots(
    scratch.words,
    scratch.before,
    scratch.slots,
    num_chosen,
    slots_together,
    rounds.visits,
    rounds.slots,
  )
  if segments == 1:
    for slot in range(scratch.slots.shape[0]):
      lanes = pl.ds(slot * _LANES, _LANES)
      out_ref[0, :, lanes] = scratch.slots[slot]
  else:
    width = scores_hbm.shape[1] // segments
    _store_joined(scratch.slots, out_ref, num_chosen, width)


def _copies(scores_hbm, scratch, group, segments, part):
  """The copies of a part of the rows: of R rows, or of one in eight."""
  width = scores_hbm.shape[1] // segments
  begin, end = _part(scratch, part)
  lanes = min(width, end * _LANES) - begin * _LANES
  target_lanes = pl.ds(begin * _LANES, lanes)
  if segments == 1:
    num_rows = scratch.row.shape[0]
    rows = pl.ds(pl.multiple_of(group * num_rows, _SUBLANES), num_rows)
    pairs = [
      (scores_hbm.at[rows, target_lanes], scratch.row.at[:, target_lanes])
    ]
  else:
    pairs = [
      (
        scores_hbm.at[
          pl.ds(group, 1), pl.ds(segment * width + begin * _LANES, lanes)
        ],
        scratch.row.at[pl.ds(segment, 1), target_lanes],
      )
      for segment in range(segments)
    ]
  return [
    pltpu.make_async_copy(source, target, scratch.semaphores.at[part])
    for source, target in pairs
  ]


def _part(scratch, part):
  """First block of a part of the rows, and that behind its last."""
  num_chunks = scratch.keys.shape[0] // bitmap.WORD_BITS
  num_parts = scratch.semaphores.shape[0]
  return tuple(
    num_chunks * p // num_parts * bitmap.WORD_BITS for p in (part, part + 1)
  )


def _start_all(scores_hbm, scratch, group, segments):
  for part in range(scratch.semaphores.shape[0]):
    _start(_copies(scores_hbm, scratch, group, segments, part))


def _start(copies):
  for copy in copies:
    copy.start()


def _wait(copies):
  for copy in copies:
    copy.wait()


def _order(scores_hbm, ends_ref, scratch, group, segments, shortest):
  """Writes the scores as integers of the same order.

  A part of the rows at a time, while the next ones come, of the next group too.
  """
  num_rows = scratch.row.shape[0]
  eights = num_rows // _SUBLANES
  if scratch.lists is not None:
    lists.clear(scratch.lists)
  ends = jnp.broadcast_to(ends_ref[...], (num_rows, _LANES))
  if shortest is None:
    shortest = jnp.min(ends_ref[...])

  for part in range(scratch.semaphores.shape[0]):
    _wait(_copies(scores_hbm, scratch, group, segments, part))
    begin, end = _part(scratch, part)
    _mask(scratch.row, ends, jnp.clip(shortest // _LANES, begin, end), end)

    def order_chunk(n, carry, begin=begin):
      # Eight rows at a time: the sorted lists fill the vector registers.
      rows = pl.ds(pl.multiple_of(n % eights * _SUBLANES, _SUBLANES), _SUBLANES)
      _order_chunk(scratch, begin // bitmap.WORD_BITS + n // eights, rows)
      return carry

    steps = (end - begin) // bitmap.WORD_BITS * eights
    jax.lax.fori_loop(0, steps, order_chunk, 0, unroll=2)

    @pl.when(pl.program_id(1) + 1 < pl.num_programs(1))
    def _(part=part):
      _start(_copies(scores_hbm, scratch, group + 1, segments, part))

  if scratch.lists is not None:
    _order_lists(scratch.lists)


def _mask(row_ref, ends, begin, end):
  """Excludes what is behind the ends from the blocks of a range."""
  lane = bitmap.iota(1, row_ref.shape[0])

  def mask(block, carry):
    lanes = pl.ds(pl.multiple_of(block * _LANES, _LANES), _LANES)
    is_in = lane < ends - block * _LANES
    row_ref[:, lanes] = jnp.where(is_in, row_ref[:, lanes], -jnp.inf)
    return carry

  jax.lax.fori_loop(begin, end, mask, 0)


def _order_chunk(scratch, chunk, rows):
  """Orders 32 blocks of eight rows, and lists the largest."""
  begin = chunk * bitmap.WORD_BITS
  scores = []
  for j in range(bitmap.WORD_BITS):
    lanes = pl.ds(pl.multiple_of((begin + j) * _LANES, _LANES), _LANES)
    x = scratch.row[rows, lanes]
    scores.append(jnp.where(jnp.isnan(x), -jnp.inf, x))
    scratch.keys[begin + j, rows] = _key(
      jax.lax.bitcast_convert_type(scores[j], jnp.int32)
    )
  if scratch.lists is not None:
    lists.insert(scratch.lists, chunk, rows, scores)


def _key(bits):
  """Sign and magnitude to two's complement: in order, and -0.0 equals 0.0."""
  return jnp.where(bits < 0, -(1 << 31) - bits, bits)


def _order_lists(lists_ref):
  def order(n, carry):
    lists_ref[n] = _key(lists_ref[n])
    return carry

  jax.lax.fori_loop(0, lists_ref.shape[0], order, 0, unroll=8)


def _row_sum(counts, segments):
  """Sums each row's counts; the result stands at every lane."""
  # float32, which the reduction unit takes, is exact up to 2^24 keys.
  total = jnp.sum(counts.astype(jnp.float32), axis=1, keepdims=True)
  if segments > 1:
    total = jnp.sum(total, axis=0, keepdims=True)
  return jnp.broadcast_to(total, counts.shape).astype(jnp.int32)


def _row_max(registers, segments):
  """The largest of each row, at every lane."""
  # As integers of 16 bits, which float32 holds, the upper half rounded down.
  largest = (functools.reduce(jnp.maximum, registers) >> 16).astype(jnp.float32)
  largest = jnp.max(largest, axis=1, keepdims=True)
  if segments > 1:
    largest = jnp.max(largest, axis=0, keepdims=True)
  return jnp.broadcast_to(largest, registers[0].shape).astype(jnp.int32) << 16


def _counts(keys_ref, bounds, segments):
  """Keys at or above each of the bounds, a row."""
  num_keys, num_rows, _ = keys_ref.shape
  chunk = math.gcd(num_keys, _CHUNK * _SUBLANES // num_rows)
  sums = max(1, _SUMS * _SUBLANES // num_rows)

  def count_chunk(c, counts):
    keys = keys_ref[pl.ds(c * chunk, chunk)]
    for n in range(0, chunk, sums):
      counts = [
        count + jnp.where(keys[n : n + sums] >= bound, 1, 0)
        for count, bound in zip(counts, bounds, strict=True)
      ]
    return counts

  zero = jnp.zeros((sums, num_rows, _LANES), jnp.int32)
  counts = jax.lax.fori_loop(
    0, num_keys // chunk, count_chunk, [zero] * len(bounds)
  )
  return [_row_sum(count.sum(axis=0), segments) for count in counts]


class _Bracket(NamedTuple):
  """What is known of the bound that k keys reach; of each row, at every lane.

  Attributes:
    low: a bound that at least k keys reach, or all that may be selected.
    high: a bound that fewer than k reach.
    num_low: keys that reach `low`.
    num_high: keys that reach `high`.
    is_slow: whether the last step left more than half of the keys between.
  """

  low: Int32[Array, "R 128"]
  high: Int32[Array, "R 128"]
  num_low: Int32[Array, "R 128"]
  num_high: Int32[Array, "R 128"]
  is_slow: Int32[Array, "R 128"]

  def is_open(self, k):
    """Whether a row has too many keys, and bounds between."""
    return (self.num_low > k) & (self.high - self.low != 1)

  def between(self, k):
    """The next two bounds to try, between `low` and `high`.

    Where the keys would lie evenly, those that a few more than k reach and a
    few fewer: about a standard deviation, so that both sides come closer.
    After a slow step the two thirds. Each step but a slow one halves the keys
    between, each slow one nearly halves the bounds or better.
    """
    half = ((self.high >> 1) - (self.low >> 1)).astype(jnp.float32)
    num_between = (self.num_low - self.num_high).astype(jnp.float32)
    surplus = (self.num_low - k).astype(jnp.float32) + 0.5
    spread = 0.5 * jnp.sqrt(num_between)
    is_slow = self.is_slow != 0
    bounds = []
    for third, target in ((1 / 3, surplus - spread), (2 / 3, surplus + spread)):
      share = jnp.where(is_slow, third, target / num_between)
      part = (half * jnp.clip(share, 0, 1)).astype(jnp.int32)
      # Twice the half, added one by one, for a span may take 32 bits.
      bound = self.low + part + part
      bounds.append(jnp.clip(bound, self.low + 1, self.high - 1))
    return bounds

  def narrow(self, k, bounds, counts):
    """Takes in how many keys reach each of the bounds."""
    low, high, num_low, num_high, _ = self
    for bound, count in zip(bounds, counts, strict=True):
      # A row that has its k keeps its bound.
      is_wanted = (num_low > k) & (bound > low) & (bound < high)
      is_low = is_wanted & (count >= k)
      is_high = is_wanted & (count < k)
      low = jnp.where(is_low, bound, low)
      high = jnp.where(is_high, bound, high)
      num_low = jnp.where(is_low, count, num_low)
      num_high = jnp.where(is_high, count, num_high)
    is_slow = 2 * (num_low - num_high) > self.num_low - self.num_high
    return _Bracket(low, high, num_low, num_high, is_slow.astype(jnp.int32))


def _search(keys_ref, k, probes, segments, passes):
  """Finds the bound that k keys reach.

  Args:
    keys_ref: `[N, R, 128]`.
    k: keys wanted.
    probes: bounds to try first.
    segments: sublanes of a row.
    passes: see `Rounds`.

  Returns:
    A bracket whose `low` is reached by k keys; by more, and then it is the k-th
    largest key; or by fewer, all that may be selected.
  """
  none = jnp.zeros(keys_ref.shape[1:], jnp.int32)
  lowest = none + _LOWEST
  num_all, *counts = _counts(keys_ref, [lowest, *probes], segments)
  bracket = _Bracket(lowest, none + (_INFINITY + 1), num_all, none, none)
  bracket = bracket.narrow(k, probes, counts)._replace(is_slow=none)

  def step(bracket):
    bounds = bracket.between(k)
    return bracket.narrow(k, bounds, _counts(keys_ref, bounds, segments))

  if passes is None:
    return jax.lax.while_loop(
      lambda bracket: jnp.any(bracket.is_open(k)), step, bracket
    )
  # Not a loop: the profiler leaves this one after its second round.
  for _ in range(passes):
    bracket = step(bracket)
  return bracket


def _choose(scratch, k, segments, passes):
  """Fills the bitmap with the k keys of each row.

  The lists may lack keys, so the bitmap of all keys decides whether their bound
  was right; most often it is.

  Returns:
    How many are chosen of each sublane, at every lane.
  """
  keys_ref, words_ref, before_ref = scratch.keys, scratch.words, scratch.before
  if scratch.lists is None:
    bracket = _search(keys_ref, k, [], segments, passes)
  else:
    num_groups = scratch.lists.shape[0] // lists.DEPTH
    maxima = [scratch.lists[n] for n in range(num_groups)]
    largest = _row_max(maxima, segments)
    probes = [largest - step for step in _FIRST_STEPS]
    bracket = _search(scratch.lists, k, probes, segments, passes)
  bitmap.store_bitmap(keys_ref, words_ref, lambda keys: keys >= bracket.low)
  num_chosen = bitmap.prefix(words_ref, before_ref)

  def choose_exactly():
    exact = bracket
    if scratch.lists is not None:
      probes = [bracket.low, bracket.high]
      exact = _search(keys_ref, k, probes, segments, None)
    _drop_ties(keys_ref, words_ref, before_ref, exact.low, k, segments)
    bitmap.store_bitmap(keys_ref, words_ref, lambda keys: keys >= exact.low)
    return bitmap.prefix(words_ref, before_ref)

  total = num_chosen
  if segments > 1:
    total = jnp.broadcast_to(jnp.sum(total, axis=0, keepdims=True), total.shape)
  is_wrong = (total > k) | ((total < k) & (bracket.low > _LOWEST))
  return jax.lax.cond(jnp.any(is_wrong), choose_exactly, lambda: num_chosen)


def _drop_ties(keys_ref, words_ref, before_ref, bound, k, segments):
  """Lowers keys equal to the bound, all but the first that are wanted."""
  (num_above,) = _counts(keys_ref, [bound + 1], segments)
  bitmap.store_bitmap(keys_ref, words_ref, lambda keys: keys == bound)
  num_ties = bitmap.prefix(words_ref, before_ref)
  wanted = k - num_above
  if segments > 1:
    # Segments before this one take theirs first.
    wanted = wanted - (bitmap.sublane_prefix_sum(num_ties) - num_ties)
  wanted = jnp.minimum(wanted, num_ties)
  rank = jnp.maximum(wanted - 1, 0)
  block = bitmap.find_blocks(before_ref, rank)
  (last,), _ = bitmap.select(words_ref, before_ref, [block], [rank])
  last = jnp.where(wanted > 0, last, -1)
  lane = bitmap.iota(1, keys_ref.shape[1])

  def drop(block, carry):
    keys = keys_ref[block]
    is_dropped = (keys == bound) & (block * _LANES + lane > last)
    keys_ref[block] = jnp.where(is_dropped, keys - 1, keys)
    return carry

  jax.lax.fori_loop(0, keys_ref.shape[0], drop, 0)


def _store_joined(slots_ref, out_ref, num_chosen, width):
  """Joins the indices of the segments of one row.

  Each sublane moves up by the number of indices of the sublanes before it,
  in one step for each bit of that number; then no two overlap.
  """
  num_slots = slots_ref.shape[0]
  offset = bitmap.sublane_prefix_sum(num_chosen) - num_chosen
  first_key = width * bitmap.iota(0, _SUBLANES)
  lane = bitmap.iota(1, _SUBLANES)
  # 0 is no index, so that a sum joins them.
  slots = [
    jnp.where(slots_ref[s] >= 0, slots_ref[s] + first_key + 1, 0)
    for s in range(num_slots)
  ]
  zero = jnp.zeros_like(offset)
  for bit in range((num_slots * _LANES).bit_length()):
    distance = 1 << bit
    if distance < _LANES:
      rolled = [bitmap.roll(x, distance) for x in slots]
      moved = [
        jnp.where(lane < distance, before, here)
        for before, here in zip([zero, *rolled[:-1]], rolled, strict=True)
      ]
    else:
      registers = min(distance // _LANES, num_slots)
      moved = [zero] * registers + slots[: num_slots - registers]
    is_moved = (offset & distance) != 0
    slots = [
      jnp.where(is_moved, m, x) for m, x in zip(moved, slots, strict=True)
    ]
  for s, x in enumerate(slots):
    joined = jnp.sum(x, axis=0, keepdims=True) - 1
    out_ref[0, :, pl.ds(s * _LANES, _LANES)] = joined
