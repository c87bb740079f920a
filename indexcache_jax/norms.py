# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and the indexer's LayerNorm, computed in float32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
  """`x / sqrt(mean(x^2) + eps) * scale`, in the dtype of `x`."""

  eps: float
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Normalises the last dimension."""
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
    return normed * scale.astype(x.dtype)


class LayerNorm(nn.Module):
  """LayerNorm with bias, for the indexer's key; eps is 1e-6 in every DSA.

  It is not `rms_norm_eps`: taking that one instead moves the boundary of the
  selection (a known fault of ports).
  """

  eps: float = 1e-6
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Normalises the last dimension."""
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + self.eps)
    return (
      normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    ).astype(x.dtype)
