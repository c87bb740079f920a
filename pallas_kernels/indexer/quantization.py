# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""8-bit floats for the indexer's queries and keys."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn, Float32

from pallas_kernels import numerics

# Largest finite float8_e4m3fn.
_LARGEST = 448.0


def quantize_rows(
  x: Float[Array, "*B D"], *, rotate: bool = False
) -> tuple[Float8e4m3fn[Array, "*B D"], Float32[Array, "*B"]]:
  """Rounds rows to float8_e4m3fn with one scale a row: `x ~ rows * scale`.

  The indexer's score is linear in a query's scale, which belongs into
  `index_weights`, and in a key's, which is `key_scale`.

  A row with one large entry spends its range on it. Rotated, the entry is
  spread over all, and the error falls; products of queries and keys that are
  both rotated stay what they were. DeepSeek-V3.2 rotates both.

  Args:
    x: rows of queries or keys.
    rotate: multiply rows by the orthonormal Hadamard matrix first; D must be a
      power of two.

  Returns:
    The rows, and positive scales. A row of zeros has scale 1.

  Raises:
    ValueError: rotation of a D that is no power of two.
  """
  x = _rotated(x) if rotate else x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=-1)
  scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
  # A scale below the least normal number would be flushed to zero.
  scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
  rows = jnp.clip(x / scale[..., None], -_LARGEST, _LARGEST)
  return rows.astype(jnp.float8_e4m3fn), scale


def _rotated(x):
  """Products of rows with the Hadamard matrix over the root of its size."""
  dim = x.shape[-1]
  if dim & (dim - 1):
    raise ValueError(f"`rotate` needs a power of two for D: got {dim}.")
  # Signs alone, exact in every dtype: one product on the matrix units.
  products = jnp.matmul(
    x,
    jnp.asarray(_hadamard_signs(dim), x.dtype),
    precision=numerics.precision(x.dtype),
    preferred_element_type=jnp.float32,
  )
  return products / jnp.sqrt(jnp.float32(dim))


@functools.cache
def _hadamard_signs(dim):
  """Sylvester's construction: `H(2n) = [[H, H], [H, -H]]`."""
  signs = np.ones((1, 1), np.int8)
  while len(signs) < dim:
    signs = np.block([[signs, signs], [signs, -signs]])
  return signs
