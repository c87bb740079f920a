# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Maps over chunks of queries, so that nothing of size T x S is ever held."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

# Bytes of a chunk's largest array. A kernel's temporaries are a few of these,
# well inside the 1 GiB that the ops promise.
CHUNK_BYTES = 1 << 27


def map_query_chunks(
  function: Callable,
  arrays: tuple[Array, ...],
  *,
  bytes_per_query: int,
) -> PyTree[Array]:
  """Maps `function` over chunks of axis 1 of all `arrays`.

  Args:
    function: from chunks `[B, chunk, ...]` to a tree of arrays
      `[B, chunk, ...]`; recomputed in the backward pass.
    arrays: all with the same first two dimensions.
    bytes_per_query: of the largest array inside `function`, for one position
      of axis 1; a chunk is as many as keep it below `CHUNK_BYTES`.

  Returns:
    The joined results. The numbers do not depend on the chunks' size beyond
    the order in which a matrix product sums.
  """
  batch, length = arrays[0].shape[:2]
  chunk = max(1, min(length, CHUNK_BYTES // max(bytes_per_query, 1)))
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
