# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The copies of selected rows into VMEM, and their way into registers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Copies of the first chunks, which nothing overlaps, in one turn of a loop.
_UNROLL = 32


class Tiles(NamedTuple):
  """Sizes of one call.

  Attributes:
    chunk: selected rows a grid step, a multiple of 128.
    buffers: chunks in VMEM, and chunks of row numbers in SMEM; a power of two.
    ahead: steps between the start of a chunk's copies and its use, 1 to
      `buffers - 1`; its numbers set out `buffers - ahead` steps before that.
    cores: TensorCores that share the queries.
    parts: of the rows of each query, attended to apart.
  """

  chunk: int
  buffers: int
  ahead: int
  cores: int
  parts: int = 1


class Problem(NamedTuple):
  """Static facts of one kernel.

  Attributes:
    heads: rows of a query.
    value_dim: leading columns of a row that are its value.
    row_tiles: rows of 128 words of a token.
    num_chunks: of one part of a query.
    steps: of one core.
    tiles: sizes.
    scale: factor on the logits.
    dtype: of queries and rows.
    with_mean_probs: whether the forward kernel returns them.
  """

  heads: int
  value_dim: int
  row_tiles: int
  num_chunks: int
  steps: int
  tiles: Tiles
  scale: float
  dtype: jnp.dtype
  with_mean_probs: bool = False


def slot_of(step: jax.Array, tiles: Tiles) -> jax.Array:
  """The buffer of a step: `step % tiles.buffers`.

  By a mask: of a remainder the compiler's static profiler takes each step's to
  be 0, and then counts no wait for a copy, or ends where one was never started.

  Raises:
    ValueError: `buffers` is no power of two.
  """
  if tiles.buffers & (tiles.buffers - 1):
    raise ValueError(
      f"`buffers` must be a power of two: got buffers={tiles.buffers}."
    )
  return step & (tiles.buffers - 1)


class Loads(NamedTuple):
  """The copies in flight; the buffer of step s is `slot_of(s, tiles)`."""

  problem: Problem
  rows_ref: jax.Ref
  words_ref: jax.Ref
  buffers: list[jax.Ref]
  index_buffers: list[jax.Ref]
  row_semaphores: jax.Ref
  index_semaphores: jax.Ref

  def start_first(self):
    """Starts the rows of the first steps and the numbers of some more."""
    tiles, steps = self.problem.tiles, self.problem.steps
    unroll = min(_UNROLL, tiles.chunk)
    for step in range(min(tiles.buffers, steps)):
      self._indices(step, step).start()
    for step in range(min(tiles.ahead, steps)):
      self._indices(step, step).wait()

      def start(i, _, step=step):
        for j in range(unroll):
          self._start_row(step, i * unroll, j)
        return 0

      jax.lax.fori_loop(0, tiles.chunk // unroll, start, 0)

  def start_indices(self, step, slot):
    """Starts the numbers of a later step, in the place of this step's."""
    slots = self.problem.tiles.buffers

    @pl.when(step + slots < self.problem.steps)
    def _():
      self._indices(step + slots, slot).start()

  def wait_indices(self, slot):
    """Waits for the numbers of the rows that this step starts."""
    tiles = self.problem.tiles
    self._indices(0, (slot + tiles.ahead) % tiles.buffers).wait()

  def _indices(self, step, slot):
    chunk = self.problem.tiles.chunk
    start = (pl.program_id(0) * self.problem.steps + step) * chunk
    return pltpu.make_async_copy(
      self.rows_ref.at[pl.ds(pl.multiple_of(start, chunk), chunk)],
      self.index_buffers[slot],
      self.index_semaphores.at[slot],
    )

  def start_rows(self, slot):
    """Starts the copies of the chunk `ahead` of this step's, unrolled."""
    tiles = self.problem.tiles
    for j in range(tiles.chunk):
      self._start_row((slot + tiles.ahead) % tiles.buffers, 0, j)

  def _start_row(self, slot, base, j):
    """Starts the copy of selected row `base + j`; base even, j static."""
    tiles = self.problem.row_tiles
    place = base + j
    if self.problem.dtype == jnp.bfloat16:
      # Rows 2 i and 2 i + 1 become the halves of word row i: see `unpack`.
      half = self.problem.tiles.chunk // 2
      place = base // 2 + j // 2 + j % 2 * half
    pltpu.make_async_copy(
      self.words_ref.at[pl.ds(self.index_buffers[slot][base + j], tiles)],
      self.buffers[slot].at[pl.ds(place * tiles, tiles)],
      self.row_semaphores.at[slot],
    ).start()

  def wait_rows(self, slot):
    """Waits for all bytes of a buffer at once."""
    buffer = self.buffers[slot]
    pltpu.make_async_copy(buffer, buffer, self.row_semaphores.at[slot]).wait()


def unpack(problem, buffer):
  """The buffer's rows `[chunk, columns]`, in the order of the selection."""
  tiles, chunk = problem.row_tiles, problem.tiles.chunk

  def words(first, size):
    return jnp.concatenate(
      [
        buffer[pl.ds(first * tiles + tile, size, stride=tiles)]
        for tile in range(tiles)
      ],
      axis=-1,
    )

  if problem.dtype == jnp.float32:
    return pltpu.bitcast(words(0, chunk), jnp.float32)
  even, odd = words(0, chunk // 2), words(chunk // 2, chunk // 2)
  # A register of bfloat16 holds rows 2 i and 2 i + 1 in the halves of word
  # row i. Here the halves of a word are two columns of one row, so two rows'
  # low halves make a register, and their high halves one 128 * tiles on.
  low = (even & jnp.uint32(0xFFFF)) | (odd << 16)
  high = (even >> 16) | (odd & jnp.uint32(0xFFFF0000))
  return jnp.concatenate(
    [pltpu.bitcast(x, jnp.bfloat16) for x in (low, high)], axis=-1
  )
