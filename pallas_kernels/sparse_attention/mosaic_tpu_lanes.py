# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A number a head, from sublanes to lanes and back.

Both go by the diagonal of a matrix of heads x 128 that is equal in one of its
directions: one masked sum, where a transposition takes whole tiles.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.sparse_attention import packing

LANES = packing.LANES


def to_lanes(column: Float32[Array, "N 128"]) -> Float32[Array, "1 128"]:
  """A row of what is equal in all lanes of a head; 0 behind the heads."""
  return jnp.sum(_diagonal(column), axis=0, keepdims=True)


def to_sublanes(
  row: Float32[Array, "1 128"], heads: int
) -> Float32[Array, "{heads} 1"]:
  """The inverse, without its lanes."""
  square = jnp.broadcast_to(row, (heads, LANES))
  return jnp.sum(_diagonal(square), axis=1, keepdims=True)


def _diagonal(x):
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1)
  )
  return jnp.where(row == column, x, 0.0)
