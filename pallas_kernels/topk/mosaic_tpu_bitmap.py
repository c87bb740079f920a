# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""From a mask over keys to the ascending indices of its set places, on a TPU.

A TensorCore has no scatter and no cumulative sum, but it gathers within the
128 lanes of a register. So the mask becomes a bitmap, and output slot p looks
for the p-th set bit, all slots at once:

  1. `pack`: place j of a word is block j of 32: two instructions a register.
  2. `transpose`: 32 x 32 bits across lanes, in five butterfly steps; now a
     word holds 32 neighbouring keys.
  3. `prefix`: set bits before each block of 128 keys.
  4. `select`: a binary search over blocks, then over the words and bits of
     one block.

Steps 2 to 4 touch a 32nd of the data. Blocks are ordered for step 4: with H
blocks for each of 128 lanes, register i holds blocks m * H + i at lane m, so
that the search is 7 gathers from register 0 and one from each of the others.
Every array here is one register, [8, 128]: 8 rows, or 8 segments of one.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES, SUBLANES, WORD_BITS = 128, 8, 32
WORDS = LANES // WORD_BITS  # Words of a block of 128 keys.
REGISTER = (SUBLANES, LANES)
# Keys of one lane position times 128: the unit of padding.
STRIDE = LANES * LANES
# Registers that a search visits without a loop: up to 128K keys.
_UNROLLED = 8
# Registers of output, and of the bitmap, worked on together: a gather's latency
# is that of many instructions. By the schedules, 16 of output take 0.6 of the
# cycles of 4, though some then wait in VMEM.
_SLOTS_TOGETHER = 16
_REGISTERS_TOGETHER = 4


def iota(axis: int):
  """Lane (1) or sublane (0) numbers."""
  return jax.lax.broadcasted_iota(jnp.int32, REGISTER, axis)


def gather(register, lanes):
  """Reads `register[row, lanes[row, l]]`."""
  return jnp.take_along_axis(register, lanes, axis=1, mode="promise_in_bounds")


def roll(register, shift: int, axis: int = 1):
  """Moves lanes up by `shift`, cyclically."""
  shift %= register.shape[axis]
  return jnp.roll(register, shift, axis) if shift else register


def prefix_sum(register, axis: int = 1):
  """Inclusive sums over lanes (1) or sublanes (0)."""
  place, step = iota(axis), 1
  while step < REGISTER[axis]:
    moved = roll(register, step, axis)
    register = register + jnp.where(place >= step, moved, 0)
    step *= 2
  return register


def pack(mask):
  """One word a place from the mask `[32, 8, 128]`: bit j is mask j's."""
  place = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 0)
  # A sum is an or here: no two share a bit.
  return jnp.sum(jnp.where(mask, 1 << place, 0), axis=0)


def transpose(words):
  """Swaps bit j of lane 32 q + i with bit i of lane 32 q + j, in each word."""
  lane = iota(1)
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
    words_ref: `[WORDS, H, 8, 128]`.
    registers: their numbers, of H.
    packed: four of `pack` for each register i; number u's bit j is of block
      (32 u + j) * H + i.
  """
  lane = iota(1)
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


def prefix(words_ref, before_ref):
  """Fills `before_ref[i]`: set bits before each block of register i.

  Returns:
    Set bits of each row, at every lane.
  """
  num_registers = words_ref.shape[1]

  def add_register(i, running):
    before_ref[i] = running
    for q in range(WORDS):
      running = running + jax.lax.population_count(words_ref[q, i])
    return running

  zero = jnp.zeros(REGISTER, jnp.int32)
  # Lane m's H blocks follow each other, so lanes are summed last.
  own = jax.lax.fori_loop(0, num_registers, add_register, zero)
  inclusive = prefix_sum(own)

  def add_lanes_before(i, carry):
    before_ref[i] = before_ref[i] + carry
    return carry

  jax.lax.fori_loop(0, num_registers, add_lanes_before, inclusive - own)
  return gather(inclusive, jnp.full(REGISTER, LANES - 1, jnp.int32))


def select(words_ref, before_ref, ranks):
  """Keys of the `ranks`-th set bits of their rows, counted from 0.

  Args:
    words_ref: of `store_words`.
    before_ref: of `prefix`.
    ranks: some registers, searched in step: a gather's latency is that of a
      hundred instructions.

  Returns:
    A register of keys for each of `ranks`; where the row has no such bit it
    means nothing.
  """
  num_registers = words_ref.shape[1]
  lanes, befores, words = _find_block(words_ref, before_ref, ranks)
  keys = []
  for rank, (block, before), block_words in zip(
    ranks, zip(lanes, befores, strict=True), words, strict=True
  ):
    lane, register = block
    place = _find_bit(block_words, rank - before)
    keys.append((lane * num_registers + register) * LANES + place)
  return keys


def _find_block(words_ref, before_ref, ranks):
  """Finds the blocks that hold the ranks.

  Returns:
    Lists, an entry a rank: lane and register of the block; the set bits
    before it; its four words.
  """
  zero = jnp.zeros(REGISTER, jnp.int32)
  lanes = [zero] * len(ranks)
  first, step = before_ref[0], LANES // 2
  while step:
    probes = [gather(first, lane + step) for lane in lanes]
    lanes = [
      jnp.where(probe <= rank, lane + step, lane)
      for probe, rank, lane in zip(probes, ranks, lanes, strict=True)
    ]
    step //= 2

  def visit(i, carry):
    """Takes block i of the lane's if no more than `rank` bits precede it."""
    taken = []
    for rank, lane, old in zip(ranks, lanes, carry, strict=True):
      before = gather(before_ref[i], lane)
      new = (i, before, *(gather(words_ref[q, i], lane) for q in range(WORDS)))
      is_reached = before <= rank
      taken.append(
        tuple(
          jnp.where(is_reached, n, o) for n, o in zip(new, old, strict=True)
        )
      )
    return tuple(taken)

  found = ((zero,) * (2 + WORDS),) * len(ranks)
  if words_ref.shape[1] <= _UNROLLED:
    for i in range(words_ref.shape[1]):
      found = visit(i, found)
  else:
    found = jax.lax.fori_loop(0, words_ref.shape[1], visit, found)
  blocks = [(lane, f[0]) for lane, f in zip(lanes, found, strict=True)]
  return blocks, [f[1] for f in found], [f[2:] for f in found]


def _find_bit(words, rank):
  """Place of the `rank`-th set bit among the four words of a block."""
  word, place = words[0], jnp.zeros(REGISTER, jnp.int32)
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


def block_of(chunk, j, num_registers: int):
  """Block that stands at place j of a chunk of 32."""
  register, quarter = chunk // WORDS, chunk % WORDS
  return (quarter * WORD_BITS + j) * num_registers + register


def store_bitmap(keys_ref, words_ref, is_set):
  """Packs the mask `is_set` of all keys."""
  chunk, num_registers = WORD_BITS, words_ref.shape[1]
  together = math.gcd(num_registers, _REGISTERS_TOGETHER)

  def store(step, carry):
    registers = [step * together + n for n in range(together)]
    packed = []
    for i in registers:
      for u in range(WORDS):
        keys = keys_ref[pl.ds((i * WORDS + u) * chunk, chunk)]
        packed.append(pack(is_set(keys)))
    store_words(words_ref, registers, packed)
    return carry

  jax.lax.fori_loop(0, num_registers // together, store, 0)


def store_slots(words_ref, before_ref, slots_ref, num_chosen):
  """Stores the ascending indices of each sublane, -1 behind."""

  num_slots = slots_ref.shape[0]
  together = math.gcd(num_slots, _SLOTS_TOGETHER)

  def store(step, carry):
    slots = [step * together + n for n in range(together)]
    ranks = [slot * LANES + iota(1) for slot in slots]
    indices = select(words_ref, before_ref, ranks)
    for slot, rank, index in zip(slots, ranks, indices, strict=True):
      slots_ref[slot] = jnp.where(rank < num_chosen, index, -1)
    return carry

  jax.lax.fori_loop(0, num_slots // together, store, 0)
