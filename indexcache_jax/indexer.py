# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer of DeepSeek Sparse Attention."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

import pallas_kernels
from indexcache_jax import config as config_lib
from indexcache_jax import linear, norms, rope, types


class IndexerOutputs(NamedTuple):
  """What the score `sum_i weights_i relu(q_i . k)` is made of."""

  index_q: Float[Array, "B T I D"]
  index_k: Float[Array, "B T D"]
  index_weights: Float32[Array, "B T I"]


class ScoreInputs(NamedTuple):
  """What is multiplied: the outputs themselves, or their 8-bit form.

  Attributes:
    index_q: queries.
    index_k: keys of the new tokens.
    index_weights: head weights; a quantised query's scale is in them.
    key_scale: factor on each key's scores; None: 1.
  """

  index_q: Float[Array, "B T I D"]
  index_k: Float[Array, "B T D"]
  index_weights: Float32[Array, "B T I"]
  key_scale: Float32[Array, "B T"] | None


def score_inputs(
  outputs: IndexerOutputs, config: config_lib.SparseTransformerConfig
) -> ScoreInputs:
  """Returns the outputs in `config.index_key_dtype`."""
  if not config.quantizes_index_keys:
    return ScoreInputs(*outputs, key_scale=None)
  index_q, query_scale = pallas_kernels.quantize_rows(
    outputs.index_q, rotate=True
  )
  index_k, key_scale = pallas_kernels.quantize_rows(
    outputs.index_k, rotate=True
  )
  return ScoreInputs(
    index_q, index_k, outputs.index_weights * query_scale, key_scale
  )


class Indexer(nn.Module):
  """Projects a full layer's input to indexer queries, keys and weights.

  DeepSeek-V3.2 technical report, equation 1. The query comes from the
  *normalised* query latent, the key from the hidden state through a LayerNorm
  with bias, both rotated in their first `qk_rope_head_dim` dimensions; the
  weights, in float32, carry the two scale factors `I**-0.5 * D**-0.5`.

  The inputs are detached: only a distillation loss trains an indexer, and
  that loss trains nothing else.
  """

  config: config_lib.SparseTransformerConfig

  @nn.compact
  def __call__(
    self,
    hidden: types.Hidden,
    query_latent: types.QueryLatent,
    rotary: rope.Rotary,
  ) -> IndexerOutputs:
    """Returns the indexer's view of the tokens of `hidden`."""
    cfg = self.config
    heads, dim = cfg.index_n_heads, cfg.index_head_dim
    hidden, query_latent = jax.lax.stop_gradient((hidden, query_latent))
    index_q = linear.dense(cfg, heads * dim, "wq_b")(query_latent)
    index_q = index_q.reshape(*index_q.shape[:2], heads, dim)
    index_k = norms.LayerNorm(param_dtype=cfg.param_dtype, name="k_norm")(
      linear.dense(cfg, dim, "wk")(hidden)
    )
    # float32: rounding the weights to bfloat16 flips near ties at the boundary.
    weights = linear.Float32Dense(cfg, heads, name="weights_proj")(hidden)
    return IndexerOutputs(
      index_q=_rotate_head(index_q, rotary, cfg),
      index_k=_rotate_head(index_k, rotary, cfg),
      index_weights=weights * (heads**-0.5 * dim**-0.5),
    )


def _rotate_head(x, tables, config):
  rotated, rest = jnp.split(x, [config.qk_rope_head_dim], axis=-1)
  rotated = rope.rotate(
    rotated, tables, interleave=config.indexer_rope_interleave
  )
  return jnp.concatenate([rotated, rest], axis=-1)
