# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""MLA over every visible key: the model before sparsity, and the teacher.

Plain XLA in query chunks, nothing of size T x S beyond a chunk; on GPUs cuDNN's
flash attention, where it can. Used by the dense stage of training and by the
indexer's warm-up (DESIGN: stage 1).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from indexcache_jax import types
from pallas_kernels import chunking, numerics

# cuDNN's limit for heads whose gradient it takes on every GPU.
_CUDNN_WIDTH = 128


def dense_mla(
  query: Float[Array, "B T N C"],
  kv_latent: types.KVLatent,
  key_start: types.KeyBounds,
  key_end: types.KeyBounds,
  *,
  scale: float,
  value_dim: int,
) -> Float[Array, "B T N {value_dim}"]:
  """Attends to every key with `key_start <= s < key_end`, absorbed form.

  Args:
    query: queries in the latent's space.
    kv_latent: latents; values are the first `value_dim` columns.
    key_start: first visible key of each query.
    key_end: one past the last visible key.
    scale: factor on the logits.
    value_dim: kv_lora_rank.

  Returns:
    Attention output in `query`'s dtype; zeros for a query that sees no key.
    Memory: 128 MiB a chunk; the backward pass recomputes each chunk. On a GPU,
    16-bit rows of at most 128 columns go through cuDNN where the bounds turn
    out, at run time, to be those of one causal sequence a row; its gradient
    sums in no fixed order.
  """
  operands = (query, kv_latent, key_start, key_end)
  in_chunks = functools.partial(_in_chunks, scale=scale, value_dim=value_dim)
  if not _suits_cudnn(query, kv_latent):
    return in_chunks(*operands)
  return jax.lax.cond(
    _is_causal(key_start, key_end),
    functools.partial(_causal, scale=scale, value_dim=value_dim),
    in_chunks,
    *operands,
  )


def _in_chunks(query, kv_latent, key_start, key_end, *, scale, value_dim):
  def attend(query, key_start, key_end):
    probs = head_probs(query, kv_latent, key_start, key_end, scale=scale)
    return jnp.einsum(
      "btns,bsv->btnv",
      probs.astype(query.dtype),
      kv_latent[..., :value_dim],
      precision=numerics.precision(query.dtype),
    ).astype(query.dtype)

  return chunking.map_query_chunks(
    attend,
    (query, key_start, key_end),
    bytes_per_query=4 * query.shape[0] * query.shape[2] * kv_latent.shape[1],
  )


def _suits_cudnn(query, kv_latent):
  return (
    jax.default_backend() == "gpu"
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and query.shape[1] == kv_latent.shape[1]
    and query.shape[3] <= _CUDNN_WIDTH
    and query.shape[3] % 8 == 0
  )


def _is_causal(key_start, key_end):
  ends = jnp.arange(1, key_end.shape[1] + 1)
  return jnp.all(key_start == 0) & jnp.all(key_end == ends)


def _causal(
  query,
  kv_latent,
  key_start,
  key_end,
  *,
  scale,
  value_dim,
  implementation="cudnn",
):
  """Multi-query attention, the whole row for a value: widths must agree."""
  del key_start, key_end
  rows = kv_latent[:, :, None]
  out = jax.nn.dot_product_attention(
    query,
    rows,
    rows,
    scale=scale,
    is_causal=True,
    implementation=implementation,
  )
  return out[..., :value_dim]


def head_probs(
  query: Float[Array, "B T N C"],
  kv_latent: types.KVLatent,
  key_start: types.KeyBounds,
  key_end: types.KeyBounds,
  *,
  scale: float,
) -> Float32[Array, "B T N S"]:
  """Attention probabilities over all keys; zero where a key is not visible."""
  logits = jnp.einsum(
    "btnc,bsc->btns",
    query,
    kv_latent,
    preferred_element_type=jnp.float32,
    precision=numerics.precision(query.dtype),
  )
  visible = visible_keys(key_start, key_end, kv_latent.shape[1])[:, :, None]
  # A finite mask keeps a row without keys free of NaN, forward and backward.
  logits = jnp.where(visible, logits * scale, jnp.finfo(jnp.float32).min)
  return jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0.0)


def visible_keys(key_start, key_end, num_keys):
  """Bool [B, T, S]: whether key s is visible to query t."""
  keys = jnp.arange(num_keys)
  return (keys >= key_start[..., None]) & (keys < key_end[..., None])
