# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""From a mask over keys to the ascending indices of its set places, on a TPU.

A TensorCore has no scatter and no cumulative sum, but it gathers within the
128 lanes of a register. So the mask becomes a bitmap, and output slot p looks
for the p-th set bit, all slots at once:

  1. `pack`: bit j of a word is block j of 32, of 128 keys each.
  2. `transpose`: 32 x 32 bits across lanes, in five butterfly steps; now a
     word holds 32 neighbouring keys, and a lane of four word planes a block.
  3. `prefix`: set bits before each block.
  4. `select`: a binary search over the 128 blocks of a register, then over the
     words and bits of one block.

Steps 2 to 4 touch a 32nd of the data. The indices of 128 slots ascend, so most
often they lie in 128 neighbouring blocks, of 1024 at 128K keys. Step 4 visits
the 128 blocks from the first one on, and the next 128 where that is not enough,
for gathers are what it waits for.

An array here is [R, 128], a register for every 8 rows: R rows, or 8 segments
of one. What is said of a register holds of each.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES, SUBLANES, WORD_BITS = 128, 8, 32
WORDS = LANES // WORD_BITS  # Words of a block of 128 keys.
STRIDE = LANES * LANES  # Keys of a register of the bitmap.
# Registers of the bitmap that are told apart without a loop: 128K keys.
_UNROLLED = 8
# Rows times registers worked on together: a gather's latency is that of many
# instructions.
_BITMAP_ROWS = 8 * SUBLANES
_MASKS = 8  # Blocks whose masks are made at once.
_FAR = (1 << 31) - 1  # More than any rank.


def iota(axis: int, rows: int):
  """Lane (1) or row (0) numbers, `[rows, 128]`."""
  return jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), axis)


def gather(register, lanes):
  """Reads `register[row, lanes[row, l]]`."""
  return jnp.take_along_axis(register, lanes, axis=1, mode="promise_in_bounds")


def roll(register, shift: int, axis: int = 1):
  """Moves lanes up by `shift`, cyclically."""
  shift %= register.shape[axis]
  return jnp.roll(register, shift, axis) if shift else register


def sublane_prefix_sum(register):
  """Inclusive sums over the eight sublanes."""
  place, step = iota(0, SUBLANES), 1
  while step < SUBLANES:
    moved = roll(register, step, 0)
    register = register + jnp.where(place >= step, moved, 0)
    step *= 2
  return register


def pack(keys_ref, begin, is_set):
  """One word a place from 32 blocks of keys: bit j is whether j's is set."""
  # A few at once: by v5e's schedule all 32 take 1.03 times as long a call.
  words = []
  for n in range(0, WORD_BITS, _MASKS):
    mask = is_set(keys_ref[pl.ds(begin + n, _MASKS)])
    place = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 0)
    # A sum is an or here: no two share a bit.
    words.append(jnp.sum(jnp.where(mask, 1 << (place + n), 0), axis=0))
  return functools.reduce(jnp.bitwise_or, words)


def transpose(words):
  """Swaps bit j of lane 32 q + i with bit i of lane 32 q + j, in each word."""
  lane = iota(1, words[0].shape[0])
  for step, low in (
    (16, 0x0000FFFF),
    (8, 0x00FF00FF),
    (4, 0x0F0F0F0F),
    (2, 0x33333333),
    (1, 0x55555555),
  ):
    is_upper = (lane & step) == 0
    others = [gather(word, lane ^ step) for word in words]
    # Lanes of one half give their upper bits for the other half's lower.
    shifted = [jnp.where(is_upper, x << step, x >> step) for x in others]
    kept = jnp.where(is_upper, low, ~low)
    words = [
      (word & kept) | (other & ~kept)
      for word, other in zip(words, shifted, strict=True)
    ]
  return words


def store_words(words_ref, registers, packed):
  """Stores registers of each of the four word planes.

  Args:
    words_ref: `[WORDS, H, R, 128]`.
    registers: their numbers, of H.
    packed: four of `pack` for each register i; number u's bit j is of block
      128 i + 32 u + j.
  """
  lane = iota(1, words_ref.shape[2])
  # Number u now holds, at lane 32 q + j, word q of that block.
  words = transpose(packed)
  for n, i in enumerate(registers):
    quarters = words[n * WORDS : (n + 1) * WORDS]
    for q in range(WORDS):
      plane = roll(quarters[0], -q * WORD_BITS)
      for u in range(1, WORDS):
        moved = roll(quarters[u], (u - q) * WORD_BITS)
        plane = jnp.where(lane >= u * WORD_BITS, moved, plane)
      words_ref[q, i] = plane


def store_bitmap(keys_ref, words_ref, is_set):
  """Packs the mask `is_set` of all keys.

  Args:
    keys_ref: `[N, R, 128]` blocks of 128 keys, N a multiple of 32.
    words_ref: of `store_words`; what is behind the keys is not set.
    is_set: from keys to whether they are chosen.
  """
  _, num_registers, rows, _ = words_ref.shape
  num_whole = keys_ref.shape[0] // LANES

  def store(registers, quarters):
    packed = []
    for i in registers:
      for u in range(quarters):
        begin = i * LANES + u * WORD_BITS
        packed.append(pack(keys_ref, begin, is_set))
      packed += [jnp.zeros((rows, LANES), jnp.int32)] * (WORDS - quarters)
    store_words(words_ref, registers, packed)

  def store_whole(step, carry):
    store([step * together + n for n in range(together)], WORDS)
    return carry

  if num_whole:
    together = math.gcd(num_whole, max(1, _BITMAP_ROWS // rows))
    jax.lax.fori_loop(0, num_whole // together, store_whole, 0)
  if num_whole < num_registers:
    store([num_whole], (keys_ref.shape[0] - num_whole * LANES) // WORD_BITS)


def prefix(words_ref, before_ref):
  """Fills `before_ref[i]`: set bits before each block of register i.

  Returns:
    Set bits of each row, at every lane.
  """
  _, num_registers, rows, _ = words_ref.shape
  # Sums over lanes as products with ones: exact, for bfloat16 holds what a
  # block can count, and quicker than seven steps of rolling.
  source = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
  target = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
  is_before = (source < target).astype(jnp.float32).astype(jnp.bfloat16)
  ones = jnp.ones((LANES, LANES), jnp.bfloat16)

  def product(counts, weights):
    sums = jnp.dot(counts, weights, preferred_element_type=jnp.float32)
    return sums.astype(jnp.int32)

  def add_register(i, running):
    own = sum(jax.lax.population_count(words_ref[q, i]) for q in range(WORDS))
    own = own.astype(jnp.float32).astype(jnp.bfloat16)
    before_ref[i] = running + product(own, is_before)
    return running + product(own, ones)

  zero = jnp.zeros((rows, LANES), jnp.int32)
  return jax.lax.fori_loop(
    0, num_registers, add_register, zero, unroll=num_registers <= _UNROLLED
  )


def find_blocks(before_ref, ranks):
  """The block that holds each of the ranks, `[R, 128]`, of all blocks."""
  zero = jnp.zeros_like(ranks)

  def visit(i, block):
    before = before_ref[i]
    (lane,) = _find_lanes([before], [zero], [ranks])
    is_reached = gather(before, zero) <= ranks
    return jnp.where(is_reached, i * LANES + lane, block)

  num_registers = before_ref.shape[0]
  return jax.lax.fori_loop(
    0, num_registers, visit, zero, unroll=num_registers <= _UNROLLED
  )


def _find_lanes(befores, firsts, ranks):
  """How far behind lane `firsts`, cyclically, the last `before` <= rank is."""
  distances = [jnp.zeros_like(rank) for rank in ranks]
  step = LANES // 2
  while step:
    probes = [
      gather(before, (first + distance + step) % LANES)
      for before, first, distance in zip(
        befores, firsts, distances, strict=True
      )
    ]
    distances = [
      jnp.where(probe <= rank, distance + step, distance)
      for probe, rank, distance in zip(probes, ranks, distances, strict=True)
    ]
    step //= 2
  return distances


def select(words_ref, before_ref, blocks, ranks):
  """Keys of the `ranks`-th set bits, counted from 0, among 128 blocks a row.

  Args:
    words_ref: of `store_words`.
    before_ref: of `prefix`.
    blocks: the first of the 128 blocks, the same along a row.
    ranks: of `[R, 128]`; lists of both are searched in step.

  Returns:
    For each of `ranks` the keys, and whether the bits are there or behind;
    where they are behind, or the row has no such bit, a key means nothing.
  """
  firsts = [block % LANES for block in blocks]
  lane = iota(1, blocks[0].shape[0])
  # Lanes before the first block's have the next register's blocks.
  registers = [
    block // LANES + jnp.where(lane < first, 1, 0)
    for block, first in zip(blocks, firsts, strict=True)
  ]
  befores, planes = _pick(words_ref, before_ref, registers)
  distances = _find_lanes(befores, firsts, ranks)
  keys, is_reached = [], []
  for block, first, rank, distance, before, words in zip(
    blocks, firsts, ranks, distances, befores, planes, strict=True
  ):
    lanes = (first + distance) % LANES
    before = gather(before, lanes)
    place = _find_bit([gather(word, lanes) for word in words], rank - before)
    keys.append((block + distance) * LANES + place)
    is_reached.append(before <= rank)
  return keys, is_reached


def _pick(words_ref, before_ref, registers):
  """`before` and the four words of the register of each place, for a list.

  Of a register that is not there, `before` is more than any rank.
  """
  num_registers = words_ref.shape[1]

  def visit(i, carry):
    here = (before_ref[i], *(words_ref[q, i] for q in range(WORDS)))
    return [
      tuple(
        jnp.where(register == i, new, old)
        for new, old in zip(here, picked, strict=True)
      )
      for register, picked in zip(registers, carry, strict=True)
    ]

  nothing = jnp.zeros_like(registers[0])
  picked = [(nothing + _FAR, *[nothing] * WORDS)] * len(registers)
  picked = jax.lax.fori_loop(
    0, num_registers, visit, picked, unroll=num_registers <= _UNROLLED
  )
  return [p[0] for p in picked], [p[1:] for p in picked]


def _find_bit(words, rank):
  """Place of the `rank`-th set bit among the four words of a block."""
  word, place = words[0], jnp.zeros_like(rank)
  for q in range(1, WORDS):
    count = jax.lax.population_count(word)
    is_past = (rank >= count) & (place == (q - 1) * WORD_BITS)
    rank = jnp.where(is_past, rank - count, rank)
    place = jnp.where(is_past, q * WORD_BITS, place)
    word = jnp.where(is_past, words[q], word)
  for step in (16, 8, 4, 2, 1):
    count = jax.lax.population_count(word & ((1 << step) - 1))
    is_past = rank >= count
    rank = jnp.where(is_past, rank - count, rank)
    place = jnp.where(is_past, place + step, place)
    word = jnp.where(is_past, word >> step, word)
  return place


def store_slots(
  words_ref, before_ref, slots_ref, num_chosen, together, visits, slots
):
  """Stores the ascending indices of each row, -1 behind.

  Args:
    words_ref: of `store_words`.
    before_ref: of `prefix`.
    slots_ref: `[K / 128, R, 128]`.
    num_chosen: of `prefix`.
    together: slots searched in step, at most.
    visits: how often 128 blocks are searched, for the cost tool; None: until
      all are found.
    slots: how many are searched, for the cost tool; None: those that are not
      empty in all rows.
  """
  num_slots = slots_ref.shape[0]

  def clear(slot, carry):
    slots_ref[slot] = jnp.full_like(num_chosen, -1)
    return carry

  jax.lax.fori_loop(0, num_slots, clear, 0)
  # The first blocks of 128 slots, one a lane.
  for begin in range(0, num_slots, LANES):
    _store_slots(
      words_ref,
      before_ref,
      slots_ref.at[pl.ds(begin, min(LANES, num_slots - begin))],
      num_chosen,
      begin,
      together,
      visits,
      slots,
    )


def _store_slots(
  words_ref, before_ref, slots_ref, num_chosen, begin, together, visits, slots
):
  """`store_slots` of at most 128 slots, from number `begin` on."""
  num_slots, rows, _ = slots_ref.shape
  num_registers = before_ref.shape[0]
  together = math.gcd(num_slots, together)
  lane = iota(1, rows)
  if slots is None:
    slots = jnp.clip(jnp.max(num_chosen) - begin * LANES, 0, num_slots * LANES)
    slots = pl.cdiv(slots, LANES)
  if num_registers == 1:
    firsts, visits = jnp.zeros_like(num_chosen), 1
  else:
    last = jnp.maximum(num_chosen - 1, 0)
    ranks = jnp.minimum((begin + lane) * LANES, last)
    firsts = find_blocks(before_ref, ranks)

  def store(step, visit):
    numbers = [step * together + n for n in range(together)]
    ranks = [(begin + slot) * LANES + lane for slot in numbers]
    blocks = [
      gather(firsts, jnp.zeros_like(lane) + slot) + visit * LANES
      for slot in numbers
    ]
    found = select(words_ref, before_ref, blocks, ranks)
    for slot, rank, key, is_reached in zip(numbers, ranks, *found, strict=True):
      is_new = is_reached & (rank < num_chosen)
      slots_ref[slot] = jnp.where(is_new, key, slots_ref[slot])

  def visit_all(visit, carry):
    def body(step, carry):
      store(step, visit)
      return carry

    return jax.lax.fori_loop(0, pl.cdiv(slots, together), body, carry)

  if visits is not None:
    # Not a loop: the profiler leaves this one after its second round.
    for visit in range(visits):
      visit_all(visit, 0)
  else:
    # A slot ends before the next begins; the last of 128 anywhere.
    nexts = roll(firsts, -1)
    if num_slots == LANES:
      end = num_registers * LANES - 1
      nexts = jnp.where(lane == LANES - 1, end, nexts)
    jax.lax.fori_loop(0, jnp.max((nexts - firsts) // LANES) + 1, visit_all, 0)
