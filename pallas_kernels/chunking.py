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
_SHARE = 8
CHUNK_BYTES = MEMORY_BYTES // _SHARE


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


def fill_windows(
  function: Callable,
  per_query: PyTree[Array],
  per_sequence: PyTree[Array],
  *,
  bytes_each: int,
  memory_bytes: int,
) -> Array:
  """Applies `function` to windows of queries, in bounded memory.

  For what has no gradient: windows are sliced one at a time, no second array of
  all queries is made, and results are written into one. The last window of an
  axis begins early enough to be whole, so that some queries come twice, to the
  same result.

  Args:
    function: from `[b, t, ...]` and `[b, ...]` to an array `[b, t, ...]`.
    per_query: arrays `[B, T, ...]`.
    per_sequence: arrays `[B, ...]`.
    bytes_each: of the largest array inside `function`, for one query.
    memory_bytes: that `function` may hold; one query's part is the least.
  """
  batch, length = jax.tree.leaves(per_query)[0].shape[:2]
  most = max(1, memory_bytes // _SHARE // max(bytes_each, 1))
  rows, columns = _even(batch, most), _even(length, most // max(batch, 1))
  if rows >= batch and columns >= length:
    return function(per_query, per_sequence)
  grid = (-(-batch // rows), -(-length // columns))

  def fill(step, out):
    row = jnp.minimum(step // grid[1] * rows, batch - rows)
    column = jnp.minimum(step % grid[1] * columns, length - columns)
    found = function(
      jax.tree.map(
        lambda x: _window(_window(x, 0, row, rows), 1, column, columns),
        per_query,
      ),
      jax.tree.map(lambda x: _window(x, 0, row, rows), per_sequence),
    )
    starts = (row, column, *(0 for _ in found.shape[2:]))
    return jax.lax.dynamic_update_slice(out, found, starts)

  shape = jax.eval_shape(
    function,
    jax.tree.map(lambda x: _part(x, rows, columns), per_query),
    jax.tree.map(lambda x: _part(x, rows), per_sequence),
  )
  out = jnp.zeros((batch, length, *shape.shape[2:]), shape.dtype)
  return jax.lax.fori_loop(0, grid[0] * grid[1], fill, out)


def _even(size, most):
  """Of a window: as many equal ones as `most` asks for, 1025 as 513 twice."""
  count = -(-size // max(1, most))
  return -(-size // max(1, count))


def _window(x, axis, start, size):
  if x.shape[axis] == size:
    return x
  return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _part(x, *sizes):
  return jax.ShapeDtypeStruct((*sizes, *x.shape[len(sizes) :]), x.dtype)
