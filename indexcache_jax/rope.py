# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, plain and YaRN, in both layouts."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from indexcache_jax import config as config_lib
from indexcache_jax import types


class Rotary(NamedTuple):
  """Cosine and sine of every token's angles, a frequency a pair."""

  cos: Float32[Array, "B T R"]
  sin: Float32[Array, "B T R"]


def inverse_frequencies(
  rope: config_lib.RopeConfig, dim: int
) -> Float32[np.ndarray, " R"]:
  """Returns the `dim / 2` angular frequencies, in float32 as engines do.

  YaRN (arXiv 2309.00071, section 3.2) divides the frequency of dimensions that
  turn slowly by `factor`, keeps the fast ones, and ramps between them.
  """
  exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  plain = np.float32(1) / np.float32(rope.rope_theta) ** exponents
  if rope.rope_type == "default":
    return plain
  low, high = _correction_range(rope, dim)
  ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low)
  keep = np.float32(1) - np.clip(ramp, 0, 1, dtype=np.float32)
  interpolated = np.float32(1) / (np.float32(rope.factor) * (1 / plain))
  return (interpolated * (1 - keep) + plain * keep).astype(np.float32)


def rotary(
  rope: config_lib.RopeConfig, dim: int, positions: types.Positions
) -> Rotary:
  """Returns the tables of `positions`, YaRN's factor on them included."""
  frequencies = jnp.asarray(inverse_frequencies(rope, dim))
  angles = positions[..., None].astype(jnp.float32) * frequencies
  scale = rope.embedding_scale
  return Rotary(cos=jnp.cos(angles) * scale, sin=jnp.sin(angles) * scale)


def rotate(
  x: Float[Array, "B T *heads E"], tables: Rotary, *, interleave: bool
) -> Float[Array, "B T *heads E"]:
  """Rotates the pairs of `x`'s last dimension.

  Args:
    x: of even width.
    tables: cosines and sines, one a pair.
    interleave: pairs are neighbours (0, 1), (2, 3), ...; else the dimension is
      split in halves and pair i is (i, i + E / 2).

  Returns:
    The rotated pairs in half-split order for both layouts. Queries and keys
    are permuted alike, so products are those of either order.
  """
  if interleave:
    first, second = x[..., 0::2], x[..., 1::2]
  else:
    first, second = jnp.split(x, 2, axis=-1)
  broadcast = tables.cos.shape[:2] + (1,) * (x.ndim - 3) + (-1,)
  cos, sin = (table.reshape(broadcast) for table in tables)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def _correction_range(rope, dim) -> tuple[float, float]:
  """First and last dimension of YaRN's ramp."""

  def dimension(num_rotations):
    period = rope.original_max_position_embeddings / (
      num_rotations * 2 * math.pi
    )
    return dim * math.log(period) / (2 * math.log(rope.rope_theta))

  low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(float(low), 0.0), min(float(high), dim - 1.0)
  # An empty ramp would divide by zero; every YaRN code widens it so.
  return low, high + 0.001 if low == high else high
