# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Maps over chunks of queries, so that nothing of size T x S is ever held."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

# Bytes that an op takes beside its arguments and result unless told otherwise.
MEMORY_BYTES = 1 << 30
# Of them for a chunk's largest array: temporaries are a few of these.
CHUNK_BYTES = MEMORY_BYTES // 8


def chunk_bytes(memory_bytes: int) -> int:
  """Bytes of a chunk's largest array in an op that may take `memory_bytes`.

  Raises:
    ValueError: `memory_bytes` below 1.
  """
  if memory_bytes < 1:
    raise ValueError(
      "`memory_bytes`, what the op may hold beside arguments and result, must"
      f" be at least 1: got {memory_bytes}. The least that it can hold is one"
      " query's part."
    )
  return memory_bytes * CHUNK_BYTES // MEMORY_BYTES


def map_sequences(
  function: Callable,
  arrays: PyTree[Array],
  *,
  bytes_per_sequence: int,
  most_bytes: int,
) -> PyTree[Array]:
  """Maps `function` over groups of axis 0, where one position is too large.

  Args:
    function: from arrays of fewer sequences to a tree of arrays.
    arrays: all with the same first dimension.
    bytes_per_sequence: of the largest array inside `function` that no chunk of
      queries makes smaller: that of one position.
    most_bytes: of it for a group, if one sequence fits.
  """
  batch = jax.tree.leaves(arrays)[0].shape[0]
  fit = max(1, min(batch, most_bytes // max(bytes_per_sequence, 1)))
  # Equal groups: a padded one would score sequences that are not there.
  group = next(size for size in range(fit, 0, -1) if batch % size == 0)
  if group == batch:
    return function(arrays)

  def split(x):
    return x.reshape(batch // group, group, *x.shape[1:])

  mapped = jax.lax.map(function, jax.tree.map(split, arrays))
  return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), mapped)


def map_query_chunks(
  function: Callable,
  arrays: tuple[Array, ...],
  *,
  bytes_per_query: int,
  most_bytes: int | None = None,
) -> PyTree[Array]:
  """Maps `function` over chunks of axis 1 of all `arrays`.

  Args:
    function: from chunks `[B, chunk, ...]` to a tree of arrays
      `[B, chunk, ...]`; recomputed in the backward pass.
    arrays: all with the same first two dimensions.
    bytes_per_query: of the largest array inside `function`, for one position
      of axis 1.
    most_bytes: of it; a chunk is as many queries as keep it below that. None:
      `CHUNK_BYTES`.

  Returns:
    The joined results. The numbers do not depend on the chunks' size beyond
    the order in which a matrix product sums.
  """
  batch, length = arrays[0].shape[:2]
  most_bytes = CHUNK_BYTES if most_bytes is None else most_bytes
  chunk = max(1, min(length, most_bytes // max(bytes_per_query, 1)))
  function = jax.checkpoint(function)
  if chunk == length:
    return function(*arrays)
  num_chunks = -(-length // chunk)
  # Equal chunks: 1025 queries with room for 1024 are 513 and 512, not 1 alone.
  chunk = -(-length // num_chunks)

  def split(x):
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, num_chunks * chunk - length)
    padded = jnp.pad(x, padding)
    return jnp.moveaxis(
      padded.reshape(batch, num_chunks, chunk, *x.shape[2:]), 1, 0
    )

  def join(x):
    joined = jnp.moveaxis(x, 0, 1)
    return joined.reshape(batch, num_chunks * chunk, *x.shape[3:])[:, :length]

  mapped = jax.lax.map(lambda args: function(*args), tuple(map(split, arrays)))
  return jax.tree.map(join, mapped)
