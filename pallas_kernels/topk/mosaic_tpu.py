# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Exact top-k on a TPU's TensorCore: a counting search, then a bitmap.

Eight rows at a time lie in VMEM as ordered integers. A search over bounds
counts, a pass over VMEM each, until exactly k are at or above the bound, or
until it has met the k-th largest; then ties go to the lower index. It starts
from a guess: the largest keys of k groups, which are few, say within some
hundred keys where the bound must be. From there it interpolates; where that
does not halve what is between, it bisects. So the data decides how long it
takes, never what is selected. A bitmap of the chosen places becomes ascending
indices. A row too long, or one of too few, is laid out as eight segments
instead of one of eight rows.

Chips with a SparseCore run this too. Tokamax's radix select for it (read, not
run) differs from our definition: of the rows that take more than one window a
subcore, ties go to the later window; -0.0 lies below 0.0; NaN with a positive
sign is selected; the indices are not ascending. And no interpreter runs a
SparseCore kernel on a CPU, so an own one could not be proven exact.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int32

from pallas_kernels import tpu
from pallas_kernels.topk import mosaic_tpu_bitmap as bitmap
from pallas_kernels.topk import mosaic_tpu_kernel

_SUBLANES, _LANES = bitmap.SUBLANES, bitmap.LANES


def top_k(
  scores: Float32[Array, "*B S"],
  k: int,
  lengths: Int32[Array, "*B"] | None = None,
  *,
  passes: int | None = None,
) -> Int32[Array, "*B {k}"]:
  """Runs the kernel on rows of any number and length.

  Args:
    scores: any float32 values.
    k: indices wanted a row.
    lengths: only the first `lengths` scores of a row count.
    passes: for the cost tool, which cannot know when a search ends: counts so
      many times, whatever the result. None: as often as needed.

  Raises:
    NotImplementedError: the chip, or a row that VMEM does not hold.
  """
  *batch, num_keys = scores.shape
  scores = scores.reshape(-1, num_keys)
  lengths = (
    jnp.full((scores.shape[0],), num_keys, jnp.int32)
    if lengths is None
    else jnp.clip(lengths.reshape(-1), 0, num_keys)
  )
  indices = tpu.over_devices(
    functools.partial(_top_k, k=k, passes=passes),
    (scores, lengths),
    [tpu.Split((0, 0), 0)],
  )
  return indices.reshape(*batch, k)


def _top_k(scores, lengths, *, k, passes):
  """`top_k` of a matrix, on one device."""
  chip = tpu.chip()
  num_rows, num_keys = scores.shape
  segments = _segments(num_rows, num_keys, chip.vmem_bytes)
  if segments > 1:
    # DMAs move whole tiles of lanes.
    scores = _pad(scores, 1, segments * _LANES)
  else:
    scores = _pad(_pad(scores, 1, _LANES), 0, _SUBLANES)
    lengths = _pad(lengths, 0, _SUBLANES)
  width = scores.shape[1] // segments
  # Keys of each sublane that count.
  ends = lengths[:, None] - width * jnp.arange(segments)
  indices = _call(
    scores,
    jnp.clip(ends, 0, width).reshape(-1, 1),
    k=k,
    segments=segments,
    chip=chip,
    passes=passes,
  )
  return indices[:num_rows, :k]


def _segments(num_rows, num_keys, vmem_bytes):
  """Eight segments a row or, where rows are many and short enough, one."""

  def fits(width):
    # The scores and their integers, of eight sublanes; the rest is for the
    # bitmap and the result.
    return 2 * 4 * _SUBLANES * (width + bitmap.STRIDE) <= vmem_bytes * 3 // 4

  if num_rows >= _SUBLANES and fits(num_keys):
    return 1
  if fits(-(-num_keys // _SUBLANES)):
    return _SUBLANES
  raise NotImplementedError(
    f"a row of {num_keys} scores does not fit VMEM of {vmem_bytes} bytes"
  )


def _pad(x, axis, multiple):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, padding) if padding[axis][1] else x


def _call(scores, ends, *, k, segments, chip, passes):
  num_rows, num_keys = scores.shape
  num_groups = num_rows * segments // _SUBLANES
  width = num_keys // segments
  num_registers = -(-width // bitmap.STRIDE)
  num_slots = -(-k // _LANES)
  # About k groups of keys a row, a power of two that divides a chunk.
  num_maxima = 1
  while num_maxima * segments < min(num_slots, bitmap.WORD_BITS):
    num_maxima *= 2
  num_cores = 1 if num_groups % chip.num_cores else chip.num_cores
  steps = num_groups // num_cores
  rows_a_group = _SUBLANES // segments
  out = jax.ShapeDtypeStruct(
    (num_groups, rows_a_group, num_slots * _LANES), jnp.int32
  )
  indices = pl.pallas_call(
    functools.partial(
      mosaic_tpu_kernel.select_rows, k=k, segments=segments, passes=passes
    ),
    out_shape=out,
    # The cores of a megacore chip share the groups; each copies its own
    # groups in turn.
    grid=(num_cores, steps),
    in_specs=[
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec((_SUBLANES, 1), lambda c, i: (c * steps + i, 0)),
    ],
    out_specs=pl.BlockSpec(
      (1, *out.shape[1:]), lambda c, i: (c * steps + i, 0, 0)
    ),
    scratch_shapes=[
      pltpu.VMEM((_SUBLANES, num_registers * bitmap.STRIDE), jnp.float32),
      pltpu.VMEM((num_registers * _LANES, *bitmap.REGISTER), jnp.int32),
      pltpu.VMEM((num_maxima, *bitmap.REGISTER), jnp.int32),
      pltpu.VMEM((bitmap.WORDS, num_registers, *bitmap.REGISTER), jnp.int32),
      pltpu.VMEM((num_registers, *bitmap.REGISTER), jnp.int32),
      pltpu.VMEM((num_slots, *bitmap.REGISTER), jnp.int32),
      pltpu.SemaphoreType.DMA((1,)),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=chip.vmem_limit_bytes,
    ),
    name="top_k",
  )(scores, ends)
  return indices.reshape(num_rows, -1)
