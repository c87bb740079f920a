# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The rows that neighbouring queries select, each once, on Hopper.

A block merges the selections of a group of queries. They are sorted, so each
row finds its place by looking for itself in the others' lists; then what is
equal to its left neighbour is dropped.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.hopper import simt

_THREADS = 256
# Behind every row in a list.
_NONE = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """A call's sizes.

  Attributes:
    share: queries of a group, 2 to 8.
    count: rows of a query.
  """

  share: int
  count: int

  @property
  def size(self) -> int:
    """Rows of a group at most."""
    return self.share * self.count

  @property
  def query_bits(self) -> int:
    """Of a query's number in its group."""
    return (self.share - 1).bit_length()

  @property
  def shared(self) -> tuple[int, ...]:
    """Words of shared memory: lists, merged rows, a sum of each warp."""
    return self.size, self.size, _THREADS // simt.WARP

  @property
  def shared_words(self) -> int:
    """Of all of it."""
    return sum(self.shared)


def most_rows(share: int) -> int:
  """Rows of a cache that fit in an entry beside the queries' bits."""
  return 1 << (31 - share)


def call(
  indices: Int32[Array, "F K"], share: int
) -> tuple[Int32[Array, "F/{share} {share}*K"], Int32[Array, " F/{share}"]]:
  """Runs the kernel.

  Args:
    indices: of each query, ascending and distinct, -1 behind them; below
      `most_rows(share)`.
    share: queries of a group, which follow each other.

  Returns:
    Entries of each group, ascending by row: the row, and in bit 31 - share + q
    whether query q of the group selects it; -1 behind them. How many there are.
  """
  plan = Plan(share, indices.shape[1])
  groups = len(indices) // share
  return simt.kernel(
    functools.partial(merge, plan),
    [
      jax.ShapeDtypeStruct((groups, plan.size), jnp.int32),
      jax.ShapeDtypeStruct((groups,), jnp.int32),
    ],
    name="sparse_mla_shared_rows",
    num_blocks=groups,
    num_threads=_THREADS,
    shared_words=plan.shared_words,
  )(indices)


def merge(
  plan: Plan,
  machine: simt.Machine,
  indices: simt.Memory,
  entries: simt.Memory,
  counts: simt.Memory,
  shared: simt.Memory,
  group: simt.Int,
) -> None:
  """The text of one thread.

  Args:
    plan: the sizes.
    machine: of the block.
    indices: `[F, K]`.
    entries: result.
    counts: result.
    shared: `plan.shared_words`.
    group: the block's.
  """
  size = plan.size
  lists, merged = shared.part(0, size), shared.part(size, size)
  sums = shared.part(2 * size, _THREADS // simt.WARP)
  load(plan, machine, indices.at(group, size), lists)
  machine.barrier()
  place(plan, machine, lists, merged)
  total = sum(
    (
      rank(plan, lists, query * plan.count, machine.int(_NONE))
      for query in range(plan.share)
    ),
    start=machine.int(0),
  )
  machine.barrier()
  count = compact(plan, machine, merged, total, sums, lists)
  machine.barrier()
  store(plan, machine, lists, count, entries.at(group, size))
  with machine.when(machine.thread == 0):
    counts.store(group, count)


def load(plan, machine, indices, lists):
  """Makes keys of the rows: the row, and its query in the lowest bits."""

  def step(i):
    index = indices.load(i)
    key = (index << plan.query_bits) | i // plan.count
    lists.store(i, (index < 0).where(_NONE, key))

  machine.each(plan.size, step)


def rank(plan, lists, first, key):
  """How many keys of the list at `first` are smaller, by bisection."""
  low, size = first, plan.count
  while size > 1:
    half = size // 2
    is_right = lists.load(low + (half - 1)) < key
    low = low + is_right.where(half, 0)
    size -= half
  return low - first + (lists.load(low) < key).to_int()


def place(plan, machine, lists, merged):
  """Stores each key where it stands among those of all lists."""

  def step(i):
    key = lists.load(i)
    query = i // plan.count
    position = i - query * plan.count
    for other in range(1, plan.share):
      number = query + other
      number = number - (number >= plan.share).where(plan.share, 0)
      position = position + rank(plan, lists, number * plan.count, key)
    with machine.when(key != _NONE):
      merged.store(position, key)

  machine.each(plan.size, step)


def compact(plan, machine, merged, total, sums, entries):
  """Writes one entry a row; returns how many. Holds a barrier."""
  chunk = -(-plan.size // _THREADS)
  begin = machine.thread * chunk
  end = (begin + chunk).minimum(total)
  bits = plan.query_bits

  def is_first(i):
    """Whether no key to the left is of the same row."""
    before = merged.load((i - 1).maximum(0)) >> bits
    return (i == 0) | (before != merged.load(i) >> bits)

  def add(i, count):
    return [i + 1, count + is_first(i).to_int()]

  _, own = machine.loop(lambda i, _: i < end, add, begin, 0)
  start, count = _prefix(machine, sums, own)

  def write(i, out):
    def emit(out):
      entries.store(out, _entry(plan, machine, merged, total, i))
      return [out + 1]

    return [i + 1, *machine.branch(is_first(i), emit, out)]

  machine.loop(lambda i, _: i < end, write, begin, start)
  return count


def _entry(plan, machine, merged, total, i):
  bits = plan.query_bits
  row = merged.load(i) >> bits
  entry = row
  for ahead in range(plan.share):
    key = merged.load((i + ahead).minimum(total - 1))
    is_same = (key >> bits == row) & (i + ahead < total)
    query = key & ((1 << bits) - 1)
    bit = machine.int(1) << (query + (31 - plan.share))
    entry = entry | is_same.where(bit, 0)
  return entry


def _prefix(machine, sums, own):
  """The sum over lower threads, and over all; holds a barrier."""
  inclusive = machine.prefix_sum(own)
  with machine.when(machine.lane == simt.WARP - 1):
    sums.store(machine.warp, inclusive)
  machine.barrier()
  before, total = inclusive - own, machine.int(0)
  for warp in range(machine.num_warps):
    value = sums.load(warp)
    before = before + (machine.warp > warp).where(value, 0)
    total = total + value
  return before, total


def store(plan, machine, found, count, entries):
  """Copies a group's entries out."""

  def step(i):
    entries.store(i, (i < count).where(found.load(i), -1))

  machine.each(plan.size, step)
