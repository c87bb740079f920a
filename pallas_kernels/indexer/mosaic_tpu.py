# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer on a TPU's TensorCore.

A grid step scores one block of queries against one block of keys, head by
head: a product on the matrix units, then ReLU, weight and sum on the vector
units, in float32. Blocks of keys that none of the block's queries sees are
neither copied nor multiplied. The selection is `top_k`'s own kernel, on chunks
of queries.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import chunking, tpu
from pallas_kernels.indexer import mosaic_tpu_kernel, reference
from pallas_kernels.topk import mosaic_tpu as topk_tpu

_LANES, _SUBLANES = 128, 8
# By the batch or by the queries; the keys are whole, for a sum over heads and
# a selection need all.
_SPLITS = (
  tpu.Split((0, 0, 0, 0, 0), 0),
  tpu.Split((1, None, 1, 1, 1), 1),
)


class Tiles(NamedTuple):
  """Sizes of a grid step.

  Attributes:
    queries: of a block.
    keys: of a block; what a step's fixed cost is spread over.
    columns: keys of one product, whose sum over heads stays in registers.
  """

  queries: int
  keys: int
  columns: int


def indexer_scores(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  *,
  tiles: Tiles | None = None,
  skip: bool = True,
) -> Float32[Array, "B T S"]:
  """Scores of a chunk of queries; the backward pass is the reference's.

  Args:
    index_q: queries; bfloat16 and, where the chip multiplies it,
      float8_e4m3fn run at the matrix units' rate; float32 at a sixth of it.
    index_k: keys, of the same dtype.
    index_weights: head weights.
    key_start: first visible key of each query.
    key_end: one past the last.
    tiles: None: by the shape.
    skip: False, for the cost tool, which cannot know what is skipped: scores
      every block.

  Raises:
    NotImplementedError: the chip, or a dtype that it does not multiply.
  """

  def score(*arguments):
    return tpu.over_devices(
      functools.partial(_scores, tiles=tiles, skip=skip), arguments, _SPLITS
    )

  return reference.with_gradient(score)(
    index_q, index_k, index_weights, key_start, key_end
  )


def indexer_topk(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  k: int,
  *,
  memory_bytes: int = chunking.MEMORY_BYTES,
) -> Int32[Array, "B T {k}"]:
  """Scores and selects, a chunk of queries at a time.

  Raises:
    NotImplementedError: as `indexer_scores` and `top_k` of this lowering.
  """
  return tpu.over_devices(
    functools.partial(_select, k=k, memory_bytes=memory_bytes),
    (index_q, index_k, index_weights, key_start, key_end),
    _SPLITS,
  )


def _select(
  index_q, index_k, index_weights, key_start, key_end, *, k, memory_bytes
):
  """`indexer_topk` on one device."""

  def select(per_query, index_k):
    index_q, index_weights, key_start, key_end = per_query
    scores = _scores(index_q, index_k, index_weights, key_start, key_end)
    return topk_tpu.top_k(scores, k, key_end)

  return chunking.fill_windows(
    select,
    (index_q, index_weights, key_start, key_end),
    index_k,
    bytes_each=4 * index_k.shape[1],
    memory_bytes=memory_bytes,
  )


def _check(index_q, index_k):
  chip = tpu.chip()
  if index_q.dtype != index_k.dtype:
    raise NotImplementedError(
      f"needs queries and keys of one dtype: got {index_q.dtype} and"
      f" {index_k.dtype}"
    )
  supported = ["bfloat16", "float32"]
  if chip.has_float8:
    supported.append("float8_e4m3fn")
  if index_q.dtype.name not in supported:
    raise NotImplementedError(
      f"the matrix units of {chip.name} take {', '.join(supported)}: got"
      f" {index_q.dtype}"
    )


def _default_tiles(num_queries, num_keys) -> Tiles:
  """Tiles for a call, from the schedules in results/tpu."""
  queries = min(128, _round_up(num_queries, _SUBLANES))
  # Few queries: the step's fixed cost counts, so its keys are more.
  keys = 1024 if queries == 128 else 4096
  keys = min(keys, _round_up(num_keys, _LANES))
  columns = 256 if keys % 256 == 0 else _LANES
  return Tiles(queries, keys, columns)


def _round_up(n, multiple):
  return -(-n // multiple) * multiple


def _pad(x, axis, multiple, value=0):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % multiple)
  if not padding[axis][1]:
    return x
  return jnp.pad(x, padding, constant_values=value)


def _scores(
  index_q,
  index_k,
  index_weights,
  key_start,
  key_end,
  *,
  tiles: Tiles | None = None,
  skip=True,
):
  """`indexer_scores` on one device."""
  _check(index_q, index_k)
  tiles = tiles or _default_tiles(index_q.shape[1], index_k.shape[1])
  batch, num_queries, heads, dim = index_q.shape
  num_keys = index_k.shape[1]
  if num_queries == 1 and heads % _SUBLANES == 0:
    # One query would leave seven of eight rows empty: eight groups of heads
    # take their place, and their scores are summed.
    fold = _SUBLANES
    index_q = index_q.reshape(batch, fold, heads // fold, dim)
    index_weights = index_weights.reshape(batch, fold, heads // fold)
    key_start, key_end = (
      jnp.broadcast_to(x, (batch, fold)) for x in (key_start, key_end)
    )
  else:
    fold = 1
  # One copy brings all heads of a block of queries.
  index_q = _pad(index_q, 1, tiles.queries)
  index_q = index_q.reshape(batch, -1, tiles.queries, *index_q.shape[2:])
  index_q = jnp.moveaxis(index_q, 3, 2)
  index_weights = _pad(index_weights, 1, tiles.queries)
  # A query that pads sees no key.
  key_start, key_end = (_pad(x, 1, tiles.queries) for x in (key_start, key_end))
  index_k = _pad(index_k, 1, tiles.keys)
  out = _call(
    index_q,
    index_k,
    index_weights,
    key_start,
    key_end,
    tiles=tiles,
    fold=fold,
    skip=skip,
  )
  return out[:, :num_queries, :num_keys]


def _call(
  index_q, index_k, index_weights, key_start, key_end, *, tiles, fold, skip
):
  batch, query_blocks, heads, _, dim = index_q.shape
  num_queries = query_blocks * tiles.queries
  num_keys = index_k.shape[1]
  chip = tpu.chip()
  key_blocks = num_keys // tiles.keys
  first, last = _visible_blocks(key_start, key_end, query_blocks, tiles.keys)

  def seen_block(b, i, j, first, last):
    """Block j, or the nearest that is seen: that one is not copied again."""
    if not skip:
      return b, j, 0
    return b, jnp.clip(j, first[b, i], jnp.maximum(last[b, i] - 1, 0)), 0

  def per_query(width):
    return pl.BlockSpec(
      (1, tiles.queries, width), lambda b, i, j, *_: (b, i, 0)
    )

  out_rows = tiles.queries // fold
  bounds = key_start[..., None], key_end[..., None]
  arrays = index_q, index_k, index_weights, *bounds
  if not skip:
    # The profiler has no figure where XLA puts an operand into VMEM first.
    arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
  return pl.pallas_call(
    functools.partial(
      mosaic_tpu_kernel.score_block, tiles=tiles, fold=fold, skip=skip
    ),
    out_shape=jax.ShapeDtypeStruct(
      (batch, num_queries // fold, num_keys), jnp.float32
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(batch, query_blocks, key_blocks),
      in_specs=[
        pl.BlockSpec(
          (1, 1, heads, tiles.queries, dim),
          lambda b, i, j, *_: (b, i, 0, 0, 0),
        ),
        pl.BlockSpec((1, tiles.keys, dim), seen_block),
        per_query(heads),
        per_query(1),
        per_query(1),
      ],
      out_specs=pl.BlockSpec(
        (1, out_rows, tiles.keys), lambda b, i, j, *_: (b, i, j)
      ),
      scratch_shapes=[pltpu.VMEM((heads, tiles.queries, _LANES), jnp.float32)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=chip.vmem_limit_bytes if skip else chip.vmem_bytes,
    ),
    name="indexer_scores",
  )(first, last, *arrays)


def _visible_blocks(key_start, key_end, query_blocks, keys):
  """First and one past the last block of keys that each query block sees."""
  batch = key_start.shape[0]
  is_empty = key_start >= key_end
  never = jnp.iinfo(jnp.int32).max
  start = jnp.where(is_empty, never, key_start)
  end = jnp.where(is_empty, 0, key_end)
  start = jnp.min(start.reshape(batch, query_blocks, -1), axis=-1)
  end = jnp.max(end.reshape(batch, query_blocks, -1), axis=-1)
  last = -(-end // keys)
  return jnp.minimum(start // keys, last), last
