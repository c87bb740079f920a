# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernel of `top_k`: copies, order, search and ties."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from pallas_kernels.topk import mosaic_tpu_bitmap as bitmap

_SUBLANES, _LANES = bitmap.SUBLANES, bitmap.LANES
# Keys: the bits of float32, as integers of the same order. From -inf down
# nothing may be selected.
_INFINITY = 0x7F800000
_EXCLUDED = -(1 << 31)
# Counts kept apart, for one alone would wait for its last addition.
_SUMS = 4
# Standard deviations of a group maximum's rank on either side of the guess.
_SPREAD = 2.5
# Bits of a guess that are searched for: sign, exponent and 9 of the fraction.
_GUESSED_BITS = 18


def select_rows(
  scores_hbm, ends_ref, out_ref, row_ref, keys_ref, maxima_ref, words_ref,
  before_ref, slots_ref, semaphore, *, k, segments, passes
):  # fmt: skip
  """One group: copy, order, search, select, store."""
  step, steps = pl.program_id(1), pl.num_programs(1)
  group = pl.program_id(0) * steps + step

  @pl.when(step == 0)
  def _():
    _start(_copies(scores_hbm, row_ref, semaphore, group, segments))

  _wait(_copies(scores_hbm, row_ref, semaphore, group, segments))
  ends = jnp.broadcast_to(ends_ref[...], bitmap.REGISTER)
  _order(row_ref, keys_ref, maxima_ref, ends)

  # The integers are a copy, so the next scores may come while these are
  # searched: the search is the longer.
  @pl.when(step + 1 < steps)
  def _():
    _start(_copies(scores_hbm, row_ref, semaphore, group + 1, segments))

  bound, num_at_least = _search(keys_ref, maxima_ref, k, ends, segments, passes)

  @pl.when(jnp.any(num_at_least > k))
  def _():
    _drop_ties(keys_ref, words_ref, before_ref, bound, k, segments)

  bitmap.store_bitmap(keys_ref, words_ref, lambda keys: keys >= bound)
  num_chosen = bitmap.prefix(words_ref, before_ref)
  bitmap.store_slots(words_ref, before_ref, slots_ref, num_chosen)
  if segments == 1:
    for slot in range(slots_ref.shape[0]):
      lanes = pl.ds(slot * _LANES, _LANES)
      out_ref[0, :, lanes] = slots_ref[slot]
  else:
    width = scores_hbm.shape[1] // segments
    _store_joined(slots_ref, out_ref, num_chosen, width)


def _copies(scores_hbm, row_ref, semaphore, group, segments):
  """The copies that bring a group's scores: eight rows, or one in eight."""
  width = scores_hbm.shape[1] // segments
  if segments == 1:
    rows = pl.ds(pl.multiple_of(group * _SUBLANES, _SUBLANES), _SUBLANES)
    pairs = [(scores_hbm.at[rows, :], row_ref.at[:, pl.ds(0, width)])]
  else:
    pairs = [
      (
        scores_hbm.at[pl.ds(group, 1), pl.ds(segment * width, width)],
        row_ref.at[pl.ds(segment, 1), pl.ds(0, width)],
      )
      for segment in range(segments)
    ]
  return [
    pltpu.make_async_copy(source, target, semaphore.at[0])
    for source, target in pairs
  ]


def _start(copies):
  for copy in copies:
    copy.start()


def _wait(copies):
  for copy in copies:
    copy.wait()


def _order(row_ref, keys_ref, maxima_ref, ends):
  """Writes the scores as integers of the same order, blocks rearranged.

  And the largest of each group: the keys of one lane in every R-th place, where
  `maxima_ref` has R registers.
  """
  num_chunks = keys_ref.shape[0] // bitmap.WORD_BITS
  num_registers = keys_ref.shape[0] // _LANES
  lane = bitmap.iota(1)

  def order_chunk(chunk, carry):
    begin = bitmap.block_of(chunk, 0, num_registers) * _LANES
    stride = num_registers * _LANES
    begins = [
      pl.multiple_of(begin + j * stride, _LANES)
      for j in range(bitmap.WORD_BITS)
    ]
    bits = jax.lax.bitcast_convert_type(
      jnp.stack([row_ref[:, pl.ds(begin, _LANES)] for begin in begins]),
      jnp.int32,
    )
    # Sign and magnitude to two's complement: in order, and -0.0 equals 0.0.
    sign = bits >> 31
    keys = ((bits & 0x7FFFFFFF) ^ sign) - sign
    # A negative NaN lies below -inf already.
    room = jnp.stack([ends - begin for begin in begins])
    is_out = (keys > _INFINITY) | (lane >= room)
    keys = jnp.where(is_out, _EXCLUDED, keys)
    keys_ref[pl.ds(chunk * bitmap.WORD_BITS, bitmap.WORD_BITS)] = keys
    groups = keys.reshape(-1, *maxima_ref.shape)
    maxima_ref[...] = jnp.maximum(maxima_ref[...], jnp.max(groups, axis=0))
    return carry

  maxima_ref[...] = jnp.full(maxima_ref.shape, _EXCLUDED, jnp.int32)

  jax.lax.fori_loop(0, num_chunks, order_chunk, 0)


def _row_sum(counts, segments):
  """Sums each row's counts; the result stands at every lane."""
  # float32, which the reduction unit takes, is exact up to 2^24 keys.
  total = jnp.sum(counts.astype(jnp.float32), axis=1, keepdims=True)
  if segments > 1:
    total = jnp.sum(total, axis=0, keepdims=True)
  return jnp.broadcast_to(total, bitmap.REGISTER).astype(jnp.int32)


def _counts(keys_ref, bounds, segments):
  """Keys at or above each of the bounds, a row."""
  chunk = _LANES

  def count_chunk(c, counts):
    keys = keys_ref[pl.ds(c * chunk, chunk)]
    for n in range(0, chunk, _SUMS):
      counts = [
        count + jnp.where(keys[n : n + _SUMS] >= bound, 1, 0)
        for count, bound in zip(counts, bounds, strict=True)
      ]
    return counts

  zero = jnp.zeros((_SUMS, *bitmap.REGISTER), jnp.int32)
  counts = jax.lax.fori_loop(
    0, keys_ref.shape[0] // chunk, count_chunk, [zero] * len(bounds)
  )
  return [_row_sum(count.sum(axis=0), segments) for count in counts]


class _Bracket(NamedTuple):
  """What is known of the bound that k keys reach; of each row, at every lane.

  Attributes:
    low: a bound that at least k keys reach, or all that may be selected.
    high: a bound that fewer than k reach.
    num_low: keys that reach `low`.
    num_high: keys that reach `high`.
    is_slow: whether the last count left more than half of the keys between.
  """

  low: Int32[Array, "8 128"]
  high: Int32[Array, "8 128"]
  num_low: Int32[Array, "8 128"]
  num_high: Int32[Array, "8 128"]
  is_slow: Int32[Array, "8 128"]

  def is_open(self, k):
    """Whether a row has too many keys, and bounds between."""
    return (self.num_low > k) & (self.high - self.low != 1)

  def middle(self, k):
    """The next bound to try, between `low` and `high`.

    Where the keys would lie evenly the one that k reach; after a slow step the
    mean. Each step but a slow one halves the keys between, each mean the
    bounds: no data takes more than 2 x 32 + log2(S) steps.
    """
    half = (self.high >> 1) - (self.low >> 1)
    share = (self.num_low - k).astype(jnp.float32) + 0.5
    share /= (self.num_low - self.num_high).astype(jnp.float32)
    part = (half.astype(jnp.float32) * share).astype(jnp.int32)
    # Twice the half, added one by one, for a span may take 32 bits.
    is_slow = self.is_slow != 0
    bound = self.low + jnp.where(is_slow, half, part)
    bound = bound + jnp.where(is_slow, 0, part)
    return jnp.clip(bound, self.low + 1, self.high - 1)

  def narrow(self, k, bound, count):
    """Takes in that `count` keys reach `bound`."""
    # A row that has its k keeps its bound.
    is_wanted = (self.num_low > k) & (bound > self.low) & (bound < self.high)
    is_low = is_wanted & (count >= k)
    is_high = is_wanted & (count < k)
    low = jnp.where(is_low, bound, self.low)
    high = jnp.where(is_high, bound, self.high)
    num_low = jnp.where(is_low, count, self.num_low)
    num_high = jnp.where(is_high, count, self.num_high)
    is_slow = 2 * (num_low - num_high) > self.num_low - self.num_high
    return _Bracket(low, high, num_low, num_high, is_slow.astype(jnp.int32))


def _search(keys_ref, maxima_ref, k, ends, segments, passes):
  """Finds the bound that k keys reach.

  Returns:
    The bound and how many keys reach it: k; more, and then the bound is the
    k-th largest key; or fewer, all that may be selected.
  """
  lowest = jnp.full(bitmap.REGISTER, 1 - _INFINITY, jnp.int32)
  highest = jnp.full(bitmap.REGISTER, _INFINITY + 1, jnp.int32)
  below, above = _guess(maxima_ref, k, ends, segments)
  num_all, num_below, num_above = _counts(
    keys_ref, [lowest, below, above], segments
  )
  none = jnp.zeros(bitmap.REGISTER, jnp.int32)
  bracket = _Bracket(lowest, highest, num_all, none, none)
  bracket = bracket.narrow(k, below, num_below).narrow(k, above, num_above)
  bracket = bracket._replace(is_slow=none)

  def step(bracket):
    bound = bracket.middle(k)
    (count,) = _counts(keys_ref, [bound], segments)
    return bracket.narrow(k, bound, count)

  if passes is None:
    bracket = jax.lax.while_loop(
      lambda bracket: jnp.any(bracket.is_open(k)), step, bracket
    )
  else:
    # Not a loop: the profiler leaves this one after its second round.
    for _ in range(passes):
      bracket = step(bracket)
  return bracket.low, bracket.num_low


def _guess(maxima_ref, k, ends, segments):
  """Two bounds that about k keys reach, most often one above, one below.

  Of n keys spread at random over G groups, a group's largest is below the
  bound with probability (1 - k / n)^(n / G). So the bound is about that
  quantile of the largest keys, and they are few.
  """
  num_registers = maxima_ref.shape[0]
  groups = num_registers * _LANES * segments
  num_keys = ends
  if segments > 1:
    num_keys = jnp.broadcast_to(
      jnp.sum(ends, axis=0, keepdims=True), bitmap.REGISTER
    )
  num_keys = jnp.maximum(num_keys, k + 1).astype(jnp.float32)
  below = jnp.exp(num_keys / groups * jnp.log(1 - k / num_keys))
  rank = groups * (1 - below)
  spread = _SPREAD * jnp.sqrt(rank * below) + 1
  ranks = [
    jnp.clip(x, 1, groups).astype(jnp.int32)
    for x in (rank + spread, rank - spread)
  ]
  bounds = [jnp.full(bitmap.REGISTER, _EXCLUDED, jnp.int32)] * 2
  maxima = [maxima_ref[r] for r in range(num_registers)]
  for shift in range(30, 30 - _GUESSED_BITS, -2):
    # Two bits at once: a sum over lanes takes as long as many comparisons.
    for n, rank in enumerate(ranks):
      tried = bounds[n]
      for _ in range(3):
        tried = tried + (1 << shift)
        count = sum(jnp.where(x >= tried, 1, 0) for x in maxima)
        reached = _row_sum(count, segments) >= rank
        bounds[n] = jnp.where(reached, tried, bounds[n])
  below, above = bounds
  return below, above + (1 << (32 - _GUESSED_BITS))


def _drop_ties(keys_ref, words_ref, before_ref, bound, k, segments):
  """Lowers keys equal to the bound, all but the first that are wanted."""
  (num_above,) = _counts(keys_ref, [bound + 1], segments)
  bitmap.store_bitmap(keys_ref, words_ref, lambda keys: keys == bound)
  num_ties = bitmap.prefix(words_ref, before_ref)
  wanted = k - num_above
  if segments > 1:
    # Segments before this one take theirs first.
    wanted = wanted - (bitmap.prefix_sum(num_ties, axis=0) - num_ties)
  wanted = jnp.minimum(wanted, num_ties)
  (last,) = bitmap.select(words_ref, before_ref, [wanted - 1])
  last = jnp.where(wanted > 0, last, -1)
  num_registers = words_ref.shape[1]
  lane = bitmap.iota(1)

  def drop(place, carry):
    chunk, j = place // bitmap.WORD_BITS, place % bitmap.WORD_BITS
    begin = bitmap.block_of(chunk, j, num_registers) * _LANES
    keys = keys_ref[place]
    is_dropped = (keys == bound) & (begin + lane > last)
    keys_ref[place] = jnp.where(is_dropped, keys - 1, keys)
    return carry

  jax.lax.fori_loop(0, keys_ref.shape[0], drop, 0)


def _store_joined(slots_ref, out_ref, num_chosen, width):
  """Joins the indices of the segments of one row.

  Each sublane moves up by the number of indices of the sublanes before it,
  in one step for each bit of that number; then no two overlap.
  """
  num_slots = slots_ref.shape[0]
  offset = bitmap.prefix_sum(num_chosen, axis=0) - num_chosen
  first_key = width * bitmap.iota(0)
  lane = bitmap.iota(1)
  # 0 is no index, so that a sum joins them.
  slots = [
    jnp.where(slots_ref[s] >= 0, slots_ref[s] + first_key + 1, 0)
    for s in range(num_slots)
  ]
  zero = jnp.zeros(bitmap.REGISTER, jnp.int32)
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
