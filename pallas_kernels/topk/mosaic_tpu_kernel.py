# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernel of `top_k`: copies, order, search and ties."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.topk import mosaic_tpu_bitmap as bitmap

_SUBLANES, _LANES = bitmap.SUBLANES, bitmap.LANES
# Keys: the bits of float32, as integers of the same order. From -inf down
# nothing may be selected.
_INFINITY = 0x7F800000
_EXCLUDED = -(1 << 31)
# Counts kept apart, for one alone would wait for its last addition.
_SUMS = 4


def select_rows(
  scores_hbm, ends_ref, out_ref, row_ref, keys_ref, words_ref, before_ref,
  slots_ref, semaphore, *, k, segments, passes
):  # fmt: skip
  """One group: copy, order, search, select, store."""
  step, steps = pl.program_id(1), pl.num_programs(1)
  group = pl.program_id(0) * steps + step

  @pl.when(step == 0)
  def _():
    _start(_copies(scores_hbm, row_ref, semaphore, group, segments))

  _wait(_copies(scores_hbm, row_ref, semaphore, group, segments))
  ends = jnp.broadcast_to(ends_ref[...], bitmap.REGISTER)
  _order(row_ref, keys_ref, ends)

  # The integers are a copy, so the next scores may come while these are
  # searched: the search is the longer.
  @pl.when(step + 1 < steps)
  def _():
    _start(_copies(scores_hbm, row_ref, semaphore, group + 1, segments))

  bound, num_at_least = _search(keys_ref, k, segments, passes)

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


def _order(row_ref, keys_ref, ends):
  """Writes the scores as integers of the same order, blocks rearranged."""
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
    keys_ref[pl.ds(chunk * bitmap.WORD_BITS, bitmap.WORD_BITS)] = jnp.where(
      is_out, _EXCLUDED, keys
    )
    return carry

  jax.lax.fori_loop(0, num_chunks, order_chunk, 0)


def _row_sum(counts, segments):
  """Sums each row's counts; the result stands at every lane."""
  # float32, which the reduction unit takes, is exact up to 2^24 keys.
  total = jnp.sum(counts.astype(jnp.float32), axis=1, keepdims=True)
  if segments > 1:
    total = jnp.sum(total, axis=0, keepdims=True)
  return jnp.broadcast_to(total, bitmap.REGISTER).astype(jnp.int32)


def _count(keys_ref, bound, segments):
  """Keys at or above `bound`, a row."""
  chunk = _LANES

  def count_chunk(c, counts):
    keys = keys_ref[pl.ds(c * chunk, chunk)]
    for n in range(0, chunk, _SUMS):
      counts = counts + jnp.where(keys[n : n + _SUMS] >= bound, 1, 0)
    return counts

  zero = jnp.zeros((_SUMS, *bitmap.REGISTER), jnp.int32)
  counts = jax.lax.fori_loop(
    0, keys_ref.shape[0] // chunk, count_chunk, zero
  ).sum(axis=0)
  return _row_sum(counts, segments)


def _search(keys_ref, k, segments, passes):
  """Finds the bound that k keys reach.

  Returns:
    The bound and how many keys reach it: k; more, and then the bound is the
    k-th largest key; or fewer, all that may be selected.
  """

  def is_open(carry):
    low, high, num_low = carry
    middle = (low & high) + ((low ^ high) >> 1)
    return jnp.any((middle != low) & (num_low > k))

  def halve(carry):
    low, high, num_low = carry
    # The mean, rounded down, without overflow.
    middle = (low & high) + ((low ^ high) >> 1)
    count = _count(keys_ref, middle, segments)
    # A row that has its k keeps its bound.
    is_low = (count >= k) & (num_low > k)
    return (
      jnp.where(is_low, middle, low),
      jnp.where(is_low, high, middle),
      jnp.where(is_low, count, num_low),
    )

  low = jnp.full(bitmap.REGISTER, 1 - _INFINITY, jnp.int32)
  high = jnp.full(bitmap.REGISTER, _INFINITY + 1, jnp.int32)
  carry = low, high, _count(keys_ref, low, segments)
  if passes is None:
    carry = jax.lax.while_loop(is_open, halve, carry)
  else:
    # Not a loop: the profiler leaves this one after its second round.
    for _ in range(passes):
      carry = halve(carry)
  low, _, num_low = carry
  return low, num_low


def _drop_ties(keys_ref, words_ref, before_ref, bound, k, segments):
  """Lowers keys equal to the bound, all but the first that are wanted."""
  num_above = _count(keys_ref, bound + 1, segments)
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
