# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Exact top-k on a Hopper GPU: one read of the scores, a block a row.

Few long rows would leave most of the GPU idle: then blocks share a row, each
selects from a segment, and a second kernel merges what they found. Segments
keep the order of the indices, so ties still go to the lower.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.hopper import chip, simt
from pallas_kernels.topk import mosaic_gpu_kernel
from pallas_kernels.topk import mosaic_gpu_kernel_source as source
from pallas_kernels.topk.mosaic_gpu_kernel import Block, Plan, Shared
from pallas_kernels.topk.mosaic_gpu_kernel_source import Parts

_MAX_K = 8192
# The buffer's limit is twice k, but at least and at most so much more than k.
_MORE_THAN_K = (512, 4096)


class Tiles(NamedTuple):
  """What a sweep on a card decides.

  Attributes:
    num_threads: of a block.
    chunks: loads of a thread in one tile.
    drained_chunks: what a thread takes from the queue at once.
    min_segment: scores of the shortest segment.
    sample_chunks: loads of a thread for the sample; the first whose keys are
      no fewer than a row's.
  """

  num_threads: int
  chunks: int
  drained_chunks: int
  min_segment: int
  sample_chunks: tuple[tuple[float, int], ...]


# Hopper: the fastest that were tried on an H200 as the kernel was written;
# `experiments.sweep_tiles` times others. Two blocks of 256 threads share a
# multiprocessor; where there are not so many rows, one of 512 has it alone. A
# block's fixed work is that of reading some thousand scores. A chunk of the
# sample costs about 1.5 us; too few let too many pass.
MANY_ROWS = Tiles(
  num_threads=256,
  chunks=4,
  drained_chunks=2,
  min_segment=8192,
  sample_chunks=((1 << 16, 1), (1 << 18, 2), (math.inf, 4)),
)
FEW_ROWS = MANY_ROWS._replace(num_threads=512)


def top_k(
  scores: Float32[Array, "*B S"],
  k: int,
  lengths: Int32[Array, "*B"] | None = None,
  *,
  tiles: Tiles | None = None,
) -> Int32[Array, "*B {k}"]:
  """Runs the kernel on rows of any number and length.

  Args:
    scores: any float32 values.
    k: indices wanted a row, at most 8192.
    lengths: only the first `lengths` scores of a row count.
    tiles: for a sweep; None: those of the rows' number.

  Raises:
    NotImplementedError: no Hopper GPU, or k too large.
  """
  multiprocessors = chip.chip().num_multiprocessors
  if k > _MAX_K:
    raise NotImplementedError(
      f"the buffer in shared memory fits k up to {_MAX_K}: got k={k}"
    )
  *batch, num_keys = scores.shape
  scores = scores.reshape(-1, num_keys)
  inputs = [scores]
  if lengths is not None:
    inputs.append(jnp.clip(lengths.reshape(-1), 0, num_keys))
  num_rows = scores.shape[0]
  plan = plan_of(num_rows, num_keys, k, multiprocessors, tiles)
  indices = jax.ShapeDtypeStruct((num_rows, k), jnp.int32)
  if plan.num_segments > 1:
    shape = (num_rows, plan.num_segments, source.width(k))
    parts = [
      jax.ShapeDtypeStruct(shape, jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.int32),
      jax.ShapeDtypeStruct(shape[:2], jnp.int32),
    ]
    inputs += _launch(plan, num_rows * plan.num_segments, parts)(*inputs)
  (found,) = _launch(plan, num_rows, [indices])(*inputs)
  return found.reshape(*batch, k)


def plan_of(
  num_rows: int,
  num_keys: int,
  k: int,
  multiprocessors: int,
  tiles: Tiles | None = None,
) -> Plan:
  """The sizes for some rows of `num_keys`."""
  if tiles is None:
    tiles = FEW_ROWS if num_rows <= multiprocessors else MANY_ROWS
  most = min(num_keys // tiles.min_segment, tiles.num_threads)
  least, greatest = _MORE_THAN_K
  return Plan(
    k=k,
    num_keys=num_keys,
    num_segments=max(1, min(multiprocessors // max(num_rows, 1), most)),
    num_threads=tiles.num_threads,
    chunks=tiles.chunks,
    sample_chunks=next(
      n for keys, n in tiles.sample_chunks if num_keys <= keys
    ),
    drained_chunks=tiles.drained_chunks,
    queue=2 * tiles.num_threads * tiles.chunks,
    limit=source.width(k) + source.width(min(max(k, least), greatest)),
  )


def _launch(plan, num_places, out):
  """A kernel of a block for each of some rows or segments.

  Args:
    plan: of both kernels, where rows have segments.
    num_places: rows or, if `out` is three arrays, segments of all rows.
    out: shapes of the result, `[indices]` or those of `Parts`.

  Returns:
    A function of scores, lengths if any, and parts if any.
  """

  return simt.kernel(
    functools.partial(_select, plan, len(out)),
    out,
    name="top_k",
    num_blocks=num_places,
    num_threads=plan.num_threads,
    shared_words=plan.shared_words,
  )


def _select(plan, num_outputs, machine, *arguments):
  """The text of one thread."""
  *arrays, shared, place = arguments
  scores, *inputs = arrays[:-num_outputs]
  # Parts are three arrays, in or out.
  lengths = inputs[0] if len(inputs) % 3 else None
  block = Block(machine, plan, Shared.of(plan, shared))
  if num_outputs == 1:
    parts = Parts(*inputs[-3:]) if plan.num_segments > 1 else None
    mosaic_gpu_kernel.select_row(
      block, scores, lengths, parts, arrays[-1], place
    )
  else:
    parts = Parts(*arrays[-3:])
    mosaic_gpu_kernel.select_part(block, scores, lengths, parts, place)
