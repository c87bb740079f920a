# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the GPU interpreter lacks, in terms of what it has.

It runs no inline code (`hopper.copies`, `hopper.float8_rows`,
`hopper.fragments`), takes no array as an operand of wgmma, and starts no
accumulator from an array. With the substitutes below a kernel's own logic
(which row, which tile, which barrier, which phase) runs on a CPU, and races
between its warpgroups are found. A copy ends before the next instruction: how
many groups of copies a kernel leaves pending is for a GPU to test.
"""

import contextlib
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import copies, float8_rows, fragments
from pallas_kernels.sparse_attention import quantization

_FIRST_NAME, _NAMES = 8, 8


class Words(NamedTuple):
  """In the place of int32 words with barriers in them.

  Attributes:
    barriers: those that copies arrive at.
    words: the rest, as a kernel numbers them.
    named: those of `synchronize` and `signal`.
    accumulators: `[warpgroups, 2, rows, columns]`.
  """

  barriers: jax.Ref
  words: jax.Ref
  named: jax.Ref
  accumulators: jax.Ref


def words_scratch(num_barriers: int, num_words: int, accumulators) -> Words:
  """Scratch of `Words`.

  Args:
    num_barriers: that copies arrive at.
    num_words: of int32.
    accumulators: rows and columns of the largest, of two warpgroups.
  """
  return Words(
    plgpu.Barrier(num_arrivals=1, num_barriers=num_barriers),
    plgpu.SMEM((num_words,), jnp.int32),
    # Of two warpgroups each.
    plgpu.Barrier(num_arrivals=2, num_barriers=_NAMES),
    plgpu.SMEM((2, 2, *accumulators), jnp.float32),
  )


class _Substitutes:
  """Forms of `copies`, `plgpu` and `pl` functions.

  Attributes:
    words: of the kernel that is being traced.
  """

  def __init__(self):
    self.words = None

  def initialize_barriers(self, words, arrivals):
    del arrivals
    self.words = Words(*words)

  def wait(self, words, barrier, parity):
    del parity
    plgpu.barrier_wait(words[0].at[barrier])

  def arrive(self, words, barrier):
    plgpu.barrier_arrive(words[0].at[barrier])

  def arrive_when_copied(self, words, barrier):
    self.arrive(words, barrier)

  def load_indices(self, indices, start, rows, mask=None):
    return indices, start, rows, mask

  def start_row_copies(
    self,
    table,
    first_row,
    num_rows,
    indices,
    destination,
    *,
    column_tiles,
    to_tile=None,
    is_kept=True,
  ):
    # What `copies` says that ptxas makes of a policy beside float8 rows.
    assert is_kept == (to_tile is None)
    row_columns = copies.TILE * 2 // table.dtype.itemsize
    first, last = (row_columns * tile for tile in column_tiles)
    _copy_rows(
      table.at[:, first:last],
      first_row,
      num_rows,
      indices,
      destination,
      column_tiles[0] if to_tile is None else to_tile,
    )

  def start_scale_copies(
    self, scales, first_row, num_rows, indices, destination, *, to_tile
  ):
    _copy_rows(scales, first_row, num_rows, indices, destination, to_tile)

  def commit(self):
    """Nothing: a copy has ended when it returns."""

  def wait_groups(self, pending):
    """Nothing: as `commit`."""

  def widen(self, destination, *, tiles, scale):
    first, last = (copies.TILE * tile for tile in tiles)
    middle = (first + last) // 2
    blocks = (last - first) // quantization.BLOCK
    values = lax.bitcast_convert_type(
      destination[:, first:middle], jnp.float8_e4m3fn
    ).reshape(-1, last - first)
    scales = destination[:, middle + scale : middle + scale + blocks]
    destination[:, first:last] = quantization.dequantize_latents(
      quantization.QuantizedLatents(values, scales, scales[:, :0])
    )

  def start_word_copies(self, source, start, destination, offset):
    words = destination[1]
    words[pl.ds(offset, copies.TILE)] = _row(source, start, copies.TILE)

  def synchronize(self, name, warpgroups):
    self.signal(name, warpgroups)
    plgpu.barrier_wait(self.words.named.at[name - _FIRST_NAME])

  def signal(self, name, warpgroups):
    assert warpgroups == 2
    # The fence in front of the barrier.
    plgpu.commit_smem()
    plgpu.barrier_arrive(self.words.named.at[name - _FIRST_NAME])

  def opaque(self, value):
    return jnp.int32(value)

  def wgmma(self, accumulator, a, b):
    a = a if isinstance(a, jax.Array) else a[...]
    accumulator[...] += jnp.dot(a, b[...], preferred_element_type=jnp.float32)

  def run_scoped(self, function, accumulator):
    zeros = jnp.zeros(accumulator.shape, jnp.float32)
    return function(self._accumulator(0, zeros))

  def run_state(self, function):
    def run(initial):
      leaves, tree = jax.tree.flatten(initial)
      accumulators = [self._accumulator(*pair) for pair in enumerate(leaves)]
      function(tree.unflatten(accumulators))
      return tree.unflatten([ref[...] for ref in accumulators])

    return run

  def _accumulator(self, place, initial):
    accumulator = self._words_of(
      lax.axis_index("warpgroup"), place, initial.shape
    )
    accumulator[...] = initial
    return accumulator

  def _words_of(self, warpgroup, place, shape):
    rows, columns = shape
    return self.words.accumulators.at[
      warpgroup, place, pl.ds(0, rows), pl.ds(0, columns)
    ]

  def reduce_rows(self, values, operation, scratch):
    del scratch
    return {"max": jnp.max, "add": jnp.sum}[operation](values, axis=0)

  def put(self, values, words):
    del words
    self._accumulator(0, values)

  def get(self, shape, words):
    del words
    return self._words_of(1 - lax.axis_index("warpgroup"), 0, shape)[...]


class _Accumulator(NamedTuple):
  """In the place of `plgpu.ACC`."""

  shape: tuple[int, ...]
  dtype: type = jnp.float32

  @staticmethod
  def init(array):
    return array


def _row(array, start, count):
  """Elements of an array as one row."""
  width = jnp.int32(array.shape[-1])
  return array[lax.div(start, width), pl.ds(lax.rem(start, width), count)]


def _copy_rows(table, first_row, num_rows, indices, destination, to_tile):
  """Gathers rows; float8 numbers become the bits of half as many bfloat16."""
  *words, mask = indices
  places = _row(*words)
  if mask is not None:
    places &= mask
  # All rows at once: an access costs the interpreter more than its bytes do.
  rows = jnp.take(
    table[...], jnp.clip(places, 0, num_rows - 1) + first_row, axis=0
  )
  rows = jnp.where(places[:, None] >= 0, rows, jnp.zeros_like(rows))
  if rows.dtype == jnp.float8_e4m3fn:
    rows = lax.bitcast_convert_type(
      rows.reshape(rows.shape[0], -1, 2), jnp.bfloat16
    )
  destination[:, pl.ds(copies.TILE * to_tile, rows.shape[1])] = rows


@contextlib.contextmanager
def interpreted(**params):
  """Within it, a kernel that gathers runs in the interpreter.

  Args:
    **params: of `plgpu.InterpretGPUParams`.
  """
  substitutes = _Substitutes()
  with contextlib.ExitStack() as stack:
    for module, names in (
      (
        copies,
        (
          "initialize_barriers",
          "wait",
          "arrive",
          "arrive_when_copied",
          "load_indices",
          "start_row_copies",
          "start_scale_copies",
          "start_word_copies",
          "commit",
          "wait_groups",
          "synchronize",
          "signal",
          "opaque",
        ),
      ),
      (float8_rows, ("widen",)),
      (fragments, ("reduce_rows", "put", "get")),
      (plgpu, ("wgmma",)),
      (pl, ("run_scoped", "run_state")),
    ):
      for name in names:
        substitute = getattr(substitutes, name)
        stack.enter_context(mock.patch.object(module, name, substitute))
    for name, substitute in (
      ("ACC", _Accumulator),
      ("load", lambda ref, **_: ref[...]),
      ("layout_cast", lambda array, _: array),
      ("set_max_registers", lambda *_, **__: None),
      ("wgmma_wait", lambda _: None),
    ):
      stack.enter_context(mock.patch.object(plgpu, name, substitute))
    stack.enter_context(
      plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params))
    )
    yield
