# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The definition of exact top-k selection."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32


def top_k(
  scores: Float32[Array, "*B S"], k: int, lengths: Int32[Array, "*B"] | None
) -> Int32[Array, "*B {k}"]:
  """`lax.top_k`, its unselectable entries dropped, its indices sorted."""
  num_keys = scores.shape[-1]
  is_candidate = ~jnp.isnan(scores)
  if lengths is not None:
    is_candidate &= jnp.arange(num_keys) < lengths[..., None]
  # XLA orders -0.0 below 0.0; the definition does not.
  scores = jnp.where(scores == 0, 0.0, scores)
  values, indices = jax.lax.top_k(
    jnp.where(is_candidate, scores, -jnp.inf), min(k, num_keys)
  )
  # The sentinel `num_keys` sorts behind every index.
  indices = jnp.sort(jnp.where(values > -jnp.inf, indices, num_keys), axis=-1)
  indices = jnp.where(indices < num_keys, indices, -1).astype(jnp.int32)
  padding = [(0, 0)] * (scores.ndim - 1) + [(0, k - indices.shape[-1])]
  return jnp.pad(indices, padding, constant_values=-1)
