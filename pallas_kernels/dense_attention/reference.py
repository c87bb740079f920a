# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The definition of dense attention's statistics, in plain XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import numerics


def dense_mla_residuals(
  query: Float[Array, "B T N C"],
  kv_latent: Float[Array, "B S C"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  *,
  scale: float,
) -> tuple[Float32[Array, "B T N"], Float32[Array, "B T S"]]:
  """All statistics of a chunk of queries, head by head: no N x T x S array."""
  keys = jnp.arange(kv_latent.shape[1])
  is_visible = (keys >= key_start[..., None]) & (keys < key_end[..., None])

  def add_head(probs, query):
    logits = jnp.einsum(
      "btc,bsc->bts",
      query,
      kv_latent,
      preferred_element_type=jnp.float32,
      precision=numerics.precision(query.dtype),
    )
    logits = jnp.where(is_visible, logits * scale, -jnp.inf)
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
    # -inf of a query without keys would make NaN of its differences.
    shift = jnp.where(log_sum_exp > -jnp.inf, log_sum_exp, 0.0)
    return probs + jnp.exp(logits - shift[..., None]), log_sum_exp

  probs, log_sum_exp = jax.lax.scan(
    add_head,
    jnp.zeros(is_visible.shape, jnp.float32),
    jnp.moveaxis(query, 2, 0),
  )
  return jnp.moveaxis(log_sum_exp, 0, -1), probs / query.shape[2]
