# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse MLA with cross-layer index reuse."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

import pallas_kernels
from indexcache_jax import cache as cache_lib
from indexcache_jax import config as config_lib
from indexcache_jax import dense_mla, linear, norms, rope, types
from indexcache_jax import indexer as indexer_lib
from pallas_kernels import numerics

AttentionKind = Literal["sparse", "dense"]

# Jitted for their lowering, which layers of one shape then share: that of a
# Mosaic GPU kernel takes half a second.
indexer_topk = jax.jit(
  pallas_kernels.indexer_topk, static_argnames=("k", "implementation")
)
sparse_mla = jax.jit(
  pallas_kernels.sparse_mla,
  static_argnames=("scale", "value_dim", "shares_rows", "implementation"),
)
sparse_mla_packed = jax.jit(
  pallas_kernels.sparse_mla_packed,
  static_argnames=("scale", "value_dim", "implementation"),
)


class AttentionContext(NamedTuple):
  """What all layers of one call share.

  Attributes:
    rotary: tables of the tokens' positions.
    key_start: first visible key of each query.
    key_end: one past its last visible key.
    cache_positions: where the tokens' rows go in the cache; None without one.
  """

  rotary: rope.Rotary
  key_start: types.KeyBounds
  key_end: types.KeyBounds
  cache_positions: types.Positions | None = None


def make_context(
  config: config_lib.SparseTransformerConfig,
  tokens: types.Tokens,
  segment_ids: Int[Array, "B T"] | None = None,
  cache_lengths: Int32[Array, " B"] | None = None,
) -> AttentionContext:
  """Returns positions and visibility of `tokens`: `s <= t`, same segment.

  Args:
    config: of the model.
    tokens: new tokens.
    segment_ids: runs of equal ids see only themselves; None: one a row.
    cache_lengths: tokens before the new ones, where there is a cache.
  """
  places = jnp.broadcast_to(
    jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
  )
  key_start = jnp.zeros_like(places)
  if segment_ids is not None:
    is_start = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    key_start = jax.lax.cummax(jnp.where(is_start, places, 0), axis=1)
  if cache_lengths is not None:
    places = places + cache_lengths[:, None]
  return AttentionContext(
    rotary=rope.rotary(
      config.rope, config.qk_rope_head_dim, places - key_start
    ),
    key_start=key_start,
    key_end=places + 1,
    cache_positions=None if cache_lengths is None else places,
  )


class IndexState(NamedTuple):
  """The index cache: what a full layer hands to the layers that it serves.

  Attributes:
    topk_indices: its selection; None in a dense pass.
    index_q: its indexer's queries, which the distillation loss scores again;
      this and the next two are None under a run-time schedule.
    index_k: its indexer's keys; with a cache of 8-bit keys, the new ones.
    index_weights: its indexer's head weights.
  """

  topk_indices: types.TopkIndices | None
  index_q: Float[Array, "B T I D"] | None = None
  index_k: types.IndexKeys | Float[Array, "B T D"] | None = None
  index_weights: Float32[Array, "B T I"] | None = None


class LayerCache(NamedTuple):
  """One layer's rows of the cache; a shared layer has no index keys."""

  kv_latent: types.KVLatent | cache_lib.PackedLatent
  index_keys: types.IndexKeys | None
  index_key_scales: Float32[Array, "B S"] | None = None


class AttentionInputs(NamedTuple):
  """What a layer's attention read, for distillation and analysis."""

  query: Float[Array, "B T N C"]
  kv_latent: types.KVLatent


class SparseMLA(nn.Module):
  """Multi-head latent attention to the rows that the index state names.

  Absorbed form: `kv_b_proj` is applied to queries and outputs, so every head
  reads the same latent rows; the numbers are those of the expanded form.
  """

  config: config_lib.SparseTransformerConfig

  @nn.compact
  def __call__(
    self,
    hidden: types.Hidden,
    context: AttentionContext,
    index: IndexState | None,
    cache: LayerCache | None,
    is_full: bool | Int32[Array, ""],
    kind: AttentionKind,
  ) -> tuple[types.Hidden, IndexState, LayerCache | None, AttentionInputs]:
    """Attends.

    Args:
      hidden: normalised input.
      context: positions and visibility.
      index: state of the source layer; None before the first layer.
      cache: this layer's rows, or None.
      is_full: whether this layer selects; an array chooses at run time.
      kind: "sparse", or "dense" for every visible key.

    Returns:
      Output, this layer's index state, updated cache, what attention read.
    """
    cfg = self.config
    query_latent = self._norm("q_a_layernorm")(
      linear.dense(
        cfg, cfg.q_lora_rank, "q_a_proj", use_bias=cfg.attention_bias
      )(hidden)
    )
    kv_latent = self._kv_latent(hidden, context.rotary)
    if cache is not None:
      kv_latent = cache_lib.write_latents(
        cache.kv_latent, kv_latent, context.cache_positions
      )
    index, keys = self._index_state(
      hidden, query_latent, context, index, cache, is_full, kind
    )
    key_up, value_up = self._up_projections()
    query = self._absorbed_query(query_latent, context.rotary, key_up)
    attended = self._attend(query, kv_latent, context, index, kind)
    heads = linear.by_head(cfg, attended, value_up)
    output = linear.dense(
      cfg, cfg.hidden_size, "o_proj", use_bias=cfg.attention_bias
    )(heads.reshape(*heads.shape[:2], -1))
    if cache is not None:
      cache = LayerCache(kv_latent, *keys)
    inputs = AttentionInputs(query, cache_lib.plain_latents(kv_latent))
    return output, index, cache, inputs

  def _norm(self, name):
    cfg = self.config
    return norms.RMSNorm(
      eps=cfg.latent_norm_eps, param_dtype=cfg.param_dtype, name=name
    )

  def _kv_latent(self, hidden, rotary):
    cfg = self.config
    compressed = linear.dense(
      cfg,
      cfg.latent_dim,
      "kv_a_proj_with_mqa",
      use_bias=cfg.attention_bias,
    )(hidden)
    latent, key_rope = jnp.split(compressed, [cfg.kv_lora_rank], axis=-1)
    latent = self._norm("kv_a_layernorm")(latent)
    key_rope = rope.rotate(key_rope, rotary, interleave=True)
    return jnp.concatenate([latent, key_rope], axis=-1)

  def _up_projections(self):
    """`kv_b_proj` as the key part [V, N, nope] and the value part [V, N, v]."""
    cfg = self.config
    heads, nope = cfg.num_attention_heads, cfg.qk_nope_head_dim
    kernel = linear.KernelOnly(
      cfg, (cfg.kv_lora_rank, heads * (nope + cfg.v_head_dim)), name="kv_b_proj"
    )()
    kernel = kernel.reshape(cfg.kv_lora_rank, heads, -1)
    return kernel[..., :nope], kernel[..., nope:]

  def _absorbed_query(self, query_latent, rotary, key_up):
    cfg = self.config
    query = linear.dense(
      cfg, cfg.num_attention_heads * cfg.qk_head_dim, "q_b_proj"
    )(query_latent)
    query = query.reshape(
      *query.shape[:2], cfg.num_attention_heads, cfg.qk_head_dim
    )
    query, query_rope = jnp.split(query, [cfg.qk_nope_head_dim], axis=-1)
    absorbed = jnp.einsum(
      "btnd,vnd->btnv", query, key_up, precision=numerics.precision(cfg.dtype)
    )
    query_rope = rope.rotate(query_rope, rotary, interleave=True)
    # In one kernel with what follows, the product for one token takes twice as
    # long on a GPU.
    absorbed = jax.lax.optimization_barrier(absorbed)
    return jnp.concatenate([absorbed, query_rope], axis=-1)

  def _attend(self, query, kv_latent, context, index, kind):
    cfg = self.config
    kwargs = {"scale": cfg.attention_scale, "value_dim": cfg.kv_lora_rank}
    if kind == "dense":
      return dense_mla.dense_mla(
        query,
        cache_lib.plain_latents(kv_latent),
        context.key_start,
        context.key_end,
        **kwargs,
      )
    kwargs["implementation"] = cfg.implementation
    if isinstance(kv_latent, cache_lib.PackedLatent):
      return sparse_mla_packed(query, kv_latent, index.topk_indices, **kwargs)
    return sparse_mla(
      query,
      kv_latent,
      index.topk_indices,
      shares_rows=cfg.shares_rows,
      **kwargs,
    )

  def _index_state(
    self, hidden, query_latent, context, index, cache, is_full, kind
  ):
    """This layer's own or its source's state; its keys and their scales."""
    if is_full is False:
      return index, (None, None)
    cfg = self.config
    indexer = indexer_lib.Indexer(cfg, name="indexer")

    def select(indexer, hidden, query_latent):
      outputs = indexer(hidden, query_latent, context.rotary)
      scored = indexer_lib.score_inputs(outputs, cfg)
      keys, scales = scored.index_k, scored.key_scale
      if cache is not None:
        keys = cache_lib.write_rows(
          cache.index_keys, keys, context.cache_positions
        )
        if scales is not None:
          scales = cache_lib.write_rows(
            cache.index_key_scales, scales, context.cache_positions
          )
      topk_indices = None
      if kind == "sparse":
        topk_indices = indexer_topk(
          scored.index_q,
          keys,
          scored.index_weights,
          context.key_start,
          context.key_end,
          k=cfg.index_topk,
          key_scale=scales,
          implementation=cfg.implementation,
        )
      # The distillation loss takes them as they were before rounding.
      index_k = outputs.index_k if cfg.quantizes_index_keys else keys
      state = IndexState(
        topk_indices, outputs.index_q, index_k, outputs.index_weights
      )
      return state, (keys, scales)

    if is_full is True or index is None:
      return select(indexer, hidden, query_latent)
    # The projections, the scores and the selection all stand inside the
    # branch: a layer that is shared at run time computes none of them.
    topk_indices = nn.cond(
      is_full != 0,
      lambda module, *args: select(module, *args)[0].topk_indices,
      lambda module, *args: index.topk_indices,
      indexer,
      hidden,
      query_latent,
    )
    return IndexState(topk_indices), (None, None)
