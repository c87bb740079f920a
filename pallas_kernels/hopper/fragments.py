# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Reductions and exchanges of wgmma's register fragments.

Pallas reduces over wgmma's rows in one scratch area of the whole block, which
several warpgroups may not share; here each brings its own. For kernels in Lane
semantics.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import copies

_WARPGROUP = 128
_LAYOUT = plgpu.Layout.WGMMA
_BY_COLUMN = _LAYOUT.reduce(0)
_PAIR_BYTES = 8


def rows_scratch_words(columns: int) -> int:
  """float32 words that a warpgroup's `reduce_rows` needs."""
  return columns // 8 * 2 * _WARPGROUP


def reduce_rows(values: jax.Array, operation: str, scratch: jax.Ref):
  """Reduces 64 rows to one, as one warpgroup.

  Args:
    values: float32 `[64, columns]`, layout `Layout.WGMMA`.
    operation: "max" or "add".
    scratch: float32 in shared memory, `rows_scratch_words(columns)` of them,
      this warpgroup's alone.

  Returns:
    float32 `[columns]`, layout `Layout.WGMMA.reduce(0)`.
  """

  @plgpu.inline_mgpu(
    arg_types=(_LAYOUT, plgpu.RefType()),
    return_type=plgpu.ShapeDtypeStruct(
      values.shape[1:], jnp.float32, layout=_BY_COLUMN
    ),
  )
  def reduce(_, values, scratch):
    return values.reduce(operation, 0, scratch)

  return reduce(values, scratch)


def put(values: jax.Array, words: jax.Ref):
  """Stores a fragment for `get` by the same thread of another warpgroup.

  Args:
    values: float32 `[rows, columns]`, layout `Layout.WGMMA`.
    words: shared memory of as many bytes or more, tiled as
      `copies.TRANSFORMS`: what it held is lost.
  """

  @plgpu.inline_mgpu(arg_types=(_LAYOUT, plgpu.RefType(copies.TRANSFORMS)))
  def store(_, values, words):
    pointer = _pointer(words)
    for i, register in enumerate(values.registers.flat):
      llvm.store(register, _pair(pointer, i))

  store(values, words)


def get(shape: tuple[int, int], words: jax.Ref) -> jax.Array:
  """Loads what `put` stored: float32 of `shape`, layout `Layout.WGMMA`."""

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(copies.TRANSFORMS),),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=_LAYOUT),
  )
  def load(_, words):
    layout = _LAYOUT.to_mgpu()
    pointer = _pointer(words)
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    for i in range(registers.size):
      registers.flat[i] = llvm.load(pair, _pair(pointer, i))
    return mgpu.FragmentedArray(
      _registers=registers, _layout=layout, _is_signed=None
    )

  return load(words)


def _pointer(words):
  """Of this thread's first pair."""
  thread = arith.andi(utils.thread_idx(), _constant(_WARPGROUP - 1))
  return utils.getelementptr(
    utils.memref_ptr(words),
    [arith.muli(thread, _constant(_PAIR_BYTES))],
    _byte(),
  )


def _pair(pointer, i):
  return utils.getelementptr(pointer, [i * _WARPGROUP * _PAIR_BYTES], _byte())


def _byte():
  return ir.IntegerType.get_signless(8)


def _constant(value):
  return arith.constant(ir.IntegerType.get_signless(32), value)
