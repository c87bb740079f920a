# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Widens gathered float8 rows to bfloat16, in the place where they lie.

Shared memory has no room for both forms. So float8 rows land in the front half
of the tiles that their bfloat16 form will fill, the scales behind them, and the
warp that copied a row then widens it there, while the next copies run.

Numbers are shifted, not converted: a float8_e4m3fn number's bits, set where
bfloat16 has its sign, lower exponent bits and upper fraction bits, are 2^-120
of its value, and one exact product with 2^120 times the scale makes two values
at a time. float8's NaN becomes 480 times the scale: `quantize_latents` has its
NaN in the scale.
"""

import itertools

import jax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import copies, simt

# Bytes of a tile and of a row in it; a row has 8 threads, a warp 4 rows.
_TILE_BYTES = 1024
_ROW_BYTES = 128
_PASS_ROWS = 16
# 2^120 in bfloat16, twice.
_BIAS = 0x7B807B80
# Of `permute`: two bytes of a word, each the lower one of a half; one half of a
# word in both.
_LOWER_BYTES = (0x4140, 0x4342)
_BOTH_HALVES = (0x1010, 0x3232)


def widen(destination: jax.Ref, *, tiles: tuple[int, int], scale: int):
  """Widens rows, or some of their columns, as the warpgroup that copied them.

  `copies.wait_groups` comes before, `copies.arrive` after.

  Args:
    destination: `[rows, width]` in shared memory with `copies.TRANSFORMS`: the
      first half of the tiles holds float8 numbers, 128 columns a tile; the next
      tile, in each row's chunk 0, the scales of all its blocks of 128.
    tiles: first and last (exclusive) tile to fill.
    scale: number of the first tile's among a row's.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(copies.TRANSFORMS),))
  def emit(_, destination):
    row_tiles, tiles_a_row, *_ = ir.MemRefType(destination.type).shape
    memory = _Memory(utils.memref_ptr(destination))
    thread = simt.warpgroup_thread()
    widen_rows(memory, thread, (row_tiles, tiles_a_row), tiles, scale)

  emit(destination)


def widen_rows(memory, thread, shape, tiles, scale):
  """The code of a thread of `widen`.

  Args:
    memory: `_Memory`, or what has its methods.
    thread: of the warpgroup: an integer as `memory` takes them.
    shape: tiles of the array, along its rows and its columns.
    tiles: as in `widen`.
    scale: as in `widen`.
  """
  row_tiles, tiles_a_row = shape
  first, last = tiles
  lines = (last - first) // 2
  row = thread >> 3
  begin = (row >> 3) * (tiles_a_row * _TILE_BYTES) + (row & 7) * _ROW_BYTES
  begin = begin + first * _TILE_BYTES
  reads, writes = zip(*_pieces(thread), strict=True)

  def load(place, line):
    at = place * _PASS_ROWS // 8 * tiles_a_row * _TILE_BYTES
    words = [
      memory.load(begin + read, at + line * _TILE_BYTES, 2) for read in reads
    ]
    behind = at + lines * _TILE_BYTES + scale // 2 * 4
    (pair,) = memory.load(begin + ((row & 7) << 4), behind, 1)
    pair = memory.product(pair, _BIAS)
    return words, memory.permute(pair, _BOTH_HALVES[(scale + line) % 2])

  def store(place, line, words, factor):
    at = place * _PASS_ROWS // 8 * tiles_a_row * _TILE_BYTES
    for write, piece in zip(writes, words, strict=True):
      memory.store(
        begin + write,
        at + 2 * line * _TILE_BYTES,
        [
          memory.product(_shifted(memory.permute(word, chosen)), factor)
          for word in piece
          for chosen in _LOWER_BYTES
        ],
      )

  turns = list(
    itertools.product(range(row_tiles * 8 // _PASS_ROWS), range(lines))
  )
  loaded = load(*turns[0])
  for turn, following in itertools.zip_longest(turns, turns[1:]):
    ahead = following and load(*following)
    if turn[1] == 0:
      # A row's values overwrite what its other threads must have read.
      memory.synchronize()
    store(*turn, *loaded)
    loaded = ahead


def _pieces(thread):
  """Where a thread finds 8 numbers of a row and puts them, in bytes, twice.

  A row of a float8 tile has 16 pieces of 8 numbers; 8 pieces fill a row of the
  first of two bfloat16 tiles, 8 that of the second, and each of a row's threads
  widens one for each. Odd rows begin with the second, so that two rows of one
  load use different banks of shared memory.
  """
  chunk, row = thread & 7, (thread >> 3) & 7
  is_odd = row & 1
  read = ((((chunk >> 1) ^ row) << 4) + ((chunk & 1) << 3)) ^ (is_odd << 6)
  write = (chunk ^ row) << 4
  return (
    (read, write + is_odd * _TILE_BYTES),
    (read ^ 64, write + (is_odd ^ 1) * _TILE_BYTES),
  )


def _shifted(byte_a_half):
  """A float8 number of each half with its bits where bfloat16 has them.

  Seven bits move up by 4, the sign by 4 and by 4 more.
  """
  return byte_a_half * 16 + (byte_a_half & 0x00800080) * 240


class _Memory:
  """Shared memory from a pointer on, and words of two bfloat16 numbers."""

  def __init__(self, pointer):
    self._pointer = pointer

  def load(self, offset, constant, count):
    """`count` words of 4 bytes, aligned."""
    words = llvm.load(
      ir.VectorType.get((count,), _i32()),
      self._at(offset, constant),
      alignment=4 * count,
    )
    return [
      simt.Int(
        offset.machine,
        vector.extract(words, dynamic_position=[], static_position=[i]),
      )
      for i in range(count)
    ]

  def store(self, offset, constant, words):
    """Stores 4 words, aligned."""
    vector_type = ir.VectorType.get((len(words),), _i32())
    value = vector.from_elements(vector_type, [word.handle for word in words])
    llvm.store(value, self._at(offset, constant), alignment=4 * len(words))

  def synchronize(self):
    """Waits for the lanes of the warp."""
    utils.inline_ptx(
      "bar.warp.sync 0xffffffff;", has_side_effects=True, convergent=True
    )

  def permute(self, word, selector):
    """Bytes 0 to 3 of a word, or zeros (4), as `prmt` selects them."""
    text = f"prmt.b32 $0, $1, 0, {selector};"
    return self._ptx(text, word)

  def product(self, x, y):
    """Of both bfloat16 numbers."""
    return self._ptx("mul.rn.bf16x2 $0, $1, $2;", x, x.machine.int(y))

  def _at(self, offset, constant):
    # The constant last: it is then part of the instruction.
    byte = ir.IntegerType.get_signless(8)
    pointer = utils.getelementptr(self._pointer, [offset.handle], byte)
    return utils.getelementptr(pointer, [constant], byte)

  def _ptx(self, text, *words):
    handles = (word.handle for word in words)
    result = utils.inline_ptx(text, *handles, result_types=_i32())
    return simt.Int(words[0].machine, result)


def _i32():
  return ir.IntegerType.get_signless(32)
