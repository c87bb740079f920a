# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The definition of sparse MLA, in plain XLA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import chunking, numerics
from pallas_kernels.sparse_attention import quantization
from pallas_kernels.sparse_attention.quantization import QuantizedLatents


class SparseMLAResiduals(NamedTuple):
  """What a split over keys and a distillation teacher need.

  Attributes:
    log_sum_exp: of the scaled logits, -inf for a query without a row.
    mean_probs: attention probabilities averaged over heads, 0 at index -1.
  """

  log_sum_exp: Float32[Array, "B T N"]
  mean_probs: Float32[Array, "B T K"]


def sparse_mla(
  query: Float[Array, "B T N C"],
  kv_latent: Float[Array, "B S C"] | QuantizedLatents,
  topk_indices: Int32[Array, "B T K"],
  *,
  scale: float,
  value_dim: int,
) -> tuple[Float[Array, "B T N {value_dim}"], SparseMLAResiduals]:
  """Gathers rows and attends, a chunk of queries at a time."""

  def attend(query, topk_indices):
    rows = quantization.gather_rows(kv_latent, topk_indices, query.dtype)
    return _attend(
      query, rows, topk_indices >= 0, scale=scale, value_dim=value_dim
    )

  batch, _, heads, width = query.shape
  return chunking.map_query_chunks(
    attend,
    (query, topk_indices),
    bytes_per_query=4 * batch * max(heads, width) * topk_indices.shape[-1],
  )


def _attend(query, rows, is_selected, *, scale, value_dim):
  precision = numerics.precision(query.dtype)
  is_selected = is_selected[:, :, None]
  logits = scale * jnp.einsum(
    "btnc,btkc->btnk",
    query,
    rows,
    preferred_element_type=jnp.float32,
    precision=precision,
  )
  # A finite mask keeps a query without rows free of NaN, gradients included.
  logits = jnp.where(is_selected, logits, jnp.finfo(jnp.float32).min)
  log_sum_exp = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  probs = jnp.where(is_selected, jnp.exp(logits - log_sum_exp), 0.0)
  out = jnp.einsum(
    "btnk,btkv->btnv",
    probs.astype(rows.dtype),
    rows[..., :value_dim],
    preferred_element_type=jnp.float32,
    precision=precision,
  )
  residuals = SparseMLAResiduals(
    log_sum_exp=jnp.where(
      jnp.any(is_selected, axis=-1), log_sum_exp[..., 0], -jnp.inf
    ),
    mean_probs=jnp.mean(probs, axis=2),
  )
  return out.astype(query.dtype), residuals
