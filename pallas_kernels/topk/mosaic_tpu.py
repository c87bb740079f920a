# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Exact top-k on a TPU's TensorCore: a counting search, then a bitmap.

Rows lie in VMEM as ordered integers, eight to 32 of them at a time. A search
over bounds counts, a pass each, until exactly k keys are at or above the bound,
or until it has met the k-th largest; then ties go to the lower index. It reads
not all keys but the largest of many groups of them, where there are that many
keys; all k of a row are among those, most often, and a count of all keys tells.
Between two bounds it interpolates; where that does not halve what is between,
it divides the bounds. So the data decides how long it takes, never what is
selected. A bitmap of the chosen places becomes ascending indices. A row too
long, or one of too few, is laid out as eight segments instead of one of eight
rows.

Chips with a SparseCore run this too. Tokamax's radix select for it differs from
our definition: -0.0 lies below 0.0, NaN with a positive sign is selected, the
indices are not ascending, and of rows that take more than one window a subcore
ties go to the later window. The first three could be mended around it, for rows
of one window; but no interpreter runs a SparseCore kernel on a CPU, so neither
it nor an own one could be proven exact (`results/tpu/README.md`).
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
from pallas_kernels.topk import mosaic_tpu_lists as lists

_SUBLANES, _LANES = bitmap.SUBLANES, bitmap.LANES
# Groups of eight rows at most that are worked on in step: what one waits for,
# a sum over lanes or a gather, the others fill.
_MOST_TOGETHER = 4
# Keys of all rows for which a group of rows more is worth its longer wait for
# the first copy; by v5e's schedule, about where the one outweighs the other.
_KEYS_TOGETHER = 1 << 18
_DATA_DECIDES = mosaic_tpu_kernel.Rounds()
# Parts of a row that are copied one by one.
_PARTS = 4


def top_k(
  scores: Float32[Array, "*B S"],
  k: int,
  lengths: Int32[Array, "*B"] | None = None,
  *,
  rounds: mosaic_tpu_kernel.Rounds = _DATA_DECIDES,
) -> Int32[Array, "*B {k}"]:
  """Runs the kernel on rows of any number and length.

  Args:
    scores: any float32 values.
    k: indices wanted a row.
    lengths: only the first `lengths` scores of a row count.
    rounds: for the cost tool.

  Raises:
    NotImplementedError: the chip, or a row that VMEM does not hold.
  """
  *batch, num_keys = scores.shape
  arguments = [scores.reshape(-1, num_keys)]
  if lengths is not None:
    arguments.append(jnp.clip(lengths.reshape(-1), 0, num_keys))
  indices = tpu.over_devices(
    functools.partial(_top_k, k=k, rounds=rounds),
    arguments,
    [tpu.Split((0,) * len(arguments), 0)],
  )
  return indices.reshape(*batch, k)


def _top_k(scores, lengths=None, *, k, rounds):
  """`top_k` of a matrix, on one device."""
  chip = tpu.chip()
  num_rows, num_keys = scores.shape
  segments = _segments(num_rows, num_keys, k, chip.vmem_bytes)
  if segments > 1:
    # DMAs move whole tiles of lanes.
    scores = _pad(scores, 1, segments * _LANES)
  else:
    scores = _pad(_pad(scores, 1, _LANES), 0, _SUBLANES)
  width = scores.shape[1] // segments
  shortest = None
  if lengths is None:
    shortest = max(0, num_keys - width * (segments - 1))
    lengths = jnp.full(scores.shape[:1], num_keys, jnp.int32)
  elif segments == 1:
    lengths = _pad(lengths, 0, _SUBLANES)
  # Keys of each sublane that count.
  ends = lengths[:, None] - width * jnp.arange(segments)
  indices = _call(
    scores,
    jnp.clip(ends, 0, width).reshape(-1, 1),
    k=k,
    segments=segments,
    chip=chip,
    shortest=shortest,
    rounds=rounds,
  )
  return indices[:num_rows, :k]


def _segments(num_rows, num_keys, k, vmem_bytes):
  """Eight segments a row or, where rows are many and short enough, one."""
  if num_rows >= _SUBLANES and _fits(_SUBLANES, num_keys, k, vmem_bytes):
    return 1
  if _fits(_SUBLANES, -(-num_keys // _SUBLANES), k, vmem_bytes):
    return _SUBLANES
  raise NotImplementedError(
    f"a row of {num_keys} scores does not fit VMEM of {vmem_bytes} bytes"
  )


def _fits(num_rows, width, k, vmem_bytes):
  """Whether VMEM holds the scores and their integers, of all these rows."""
  # The compiler sets the kernel's limit aside, half of VMEM, and beside that
  # what the kernel asks for: an eighth is for the lists and the bitmap.
  room = vmem_bytes * 3 // 8
  results = 3 * 4 * num_rows * k
  return 2 * 4 * num_rows * (width + bitmap.STRIDE) + results <= room


def _eights_together(num_eights, width, k, vmem_bytes):
  """How many groups of eight rows are worked on in step."""
  together = 1
  while (
    together < _MOST_TOGETHER
    and num_eights % (2 * together) == 0
    and (2 * together) ** 2 * width <= num_eights * _KEYS_TOGETHER
    and _fits(2 * together * _SUBLANES, width, k, vmem_bytes)
  ):
    together *= 2
  return together


def _pad(x, axis, multiple):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, padding) if padding[axis][1] else x


def _num_groups(k, segments, num_blocks):
  """Groups a lane whose largest keys are listed; 0: the keys are few."""
  groups = 1
  while groups * _LANES * segments < k:
    groups *= 2
  is_worth_it = 2 * groups * lists.DEPTH <= num_blocks
  return groups if is_worth_it and groups <= lists.MAX_GROUPS else 0


def _call(scores, ends, *, k, segments, chip, shortest, rounds):
  num_rows, num_keys = scores.shape
  width = num_keys // segments
  num_registers = -(-width // bitmap.STRIDE)
  num_chunks = -(-width // (bitmap.WORD_BITS * _LANES))
  num_blocks = num_chunks * bitmap.WORD_BITS
  num_lists = lists.DEPTH * _num_groups(k, segments, num_blocks)
  num_slots = -(-k // _LANES)
  num_eights = num_rows * segments // _SUBLANES
  num_cores = 1 if num_eights % chip.num_cores else chip.num_cores
  together = 1
  if segments == 1:
    together = _eights_together(
      num_eights // num_cores, width, k, chip.vmem_bytes
    )
  rows = together * _SUBLANES
  steps = num_eights // together // num_cores
  block = (1, rows // segments, num_slots * _LANES)
  registers = (rows, _LANES)
  indices = pl.pallas_call(
    functools.partial(
      mosaic_tpu_kernel.select_rows,
      k=k,
      segments=segments,
      shortest=shortest,
      rounds=rounds,
    ),
    out_shape=jax.ShapeDtypeStruct((steps * num_cores, *block[1:]), jnp.int32),
    # The cores of a megacore chip share the groups; each copies its own
    # groups in turn.
    grid=(num_cores, steps),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.HBM),
      pl.BlockSpec((rows, 1), lambda c, i: (c * steps + i, 0)),
    ],
    out_specs=pl.BlockSpec(block, lambda c, i: (c * steps + i, 0, 0)),
    scratch_shapes=[
      mosaic_tpu_kernel.Scratch(
        pltpu.VMEM((rows, num_blocks * _LANES), jnp.float32),
        pltpu.VMEM((num_blocks, *registers), jnp.int32),
        pltpu.VMEM((num_lists, *registers), jnp.int32) if num_lists else None,
        pltpu.VMEM((bitmap.WORDS, num_registers, *registers), jnp.int32),
        pltpu.VMEM((num_registers, *registers), jnp.int32),
        pltpu.VMEM((num_slots, *registers), jnp.int32),
        pltpu.SemaphoreType.DMA((min(_PARTS, num_chunks),)),
      )
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=chip.vmem_bytes // 2,
    ),
    name="top_k",
  )(
    # Else XLA may copy them to VMEM whole, before the kernel begins.
    pltpu.with_memory_space_constraint(scores, pltpu.HBM),
    ends,
  )
  return indices.reshape(num_rows, -1)
