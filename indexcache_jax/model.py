# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The DSA transformer with cross-layer index reuse.

The paper (arXiv 2603.12201, section 3) is the loop in
`SparseTransformer.__call__`: one variable, `index`, is the index cache. A full
layer sets it, a shared layer reads it.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Int32

from indexcache_jax import attention, decoder, linear, norms, types
from indexcache_jax import cache as cache_lib
from indexcache_jax import config as config_lib
from pallas_kernels import numerics


class Aux(NamedTuple):
  """What distillation, analysis and generation read beside the logits.

  Under `jax.jit`, whatever the caller does not return costs nothing.

  Attributes:
    topk_indices: the selection that each layer attended to, a shared layer
      that of its source: L int32 arrays, ascending, -1 at the row's end.
    index_states: the whole index state that each layer used.
    attention_inputs: the latent queries and rows that each layer read.
    key_start: first visible key of each query.
    key_end: one past the last visible key.
    cache: updated cache; None if none was given.
  """

  topk_indices: tuple[types.TopkIndices | None, ...]
  index_states: tuple[attention.IndexState, ...]
  attention_inputs: tuple[attention.AttentionInputs, ...]
  key_start: types.KeyBounds
  key_end: types.KeyBounds
  cache: cache_lib.Cache | None


class SparseTransformer(nn.Module):
  """Decoder-only transformer of `config`, DeepSeek-V3.2's or GLM-5's."""

  config: config_lib.SparseTransformerConfig

  def setup(self):
    """Builds the parts under the names of a published checkpoint."""
    cfg = self.config
    self.embed_tokens = nn.Embed(
      cfg.vocab_size,
      cfg.hidden_size,
      # Rows are taken before they are rounded: the gradient of a frequent
      # token sums in the parameters' dtype, not over thousands of bfloat16.
      dtype=cfg.param_dtype,
      param_dtype=cfg.param_dtype,
      embedding_init=nn.initializers.normal(cfg.initializer_range),
    )
    self.layers = [
      decoder.DecoderLayer(cfg, use_experts=cfg.is_sparse_mlp(layer))
      for layer in range(cfg.num_hidden_layers)
    ]
    self.norm = norms.RMSNorm(eps=cfg.rms_norm_eps, param_dtype=cfg.param_dtype)
    self.lm_head = linear.KernelOnly(cfg, (cfg.hidden_size, cfg.vocab_size))

  def __call__(
    self,
    tokens: types.Tokens,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    cache: cache_lib.Cache | None = None,
    runtime_schedule: Int32[Array, " L"] | None = None,
    attention_kind: attention.AttentionKind = "sparse",
    logits_for: Literal["all", "last"] = "all",
  ) -> tuple[Float32[Array, "B U vocab"], Aux]:
    """Runs the model.

    Args:
      tokens: token ids. With a cache they continue its sequences, so that
        prefill, chunked prefill and decode are one call.
      segment_ids: packed sequences; a run of equal ids is one segment, whose
        positions start at 0 and which sees no other. Not with a cache.
      lengths: real tokens of each row, the rest being padding at the right;
        None: all.
      cache: rows of past tokens, from `init_cache`. Its capacity must hold the
        new tokens: a row beyond it is dropped.
      runtime_schedule: 1 for a full layer, 0 for a shared one, in place of
        `config.schedule`, which must be all full. One compilation serves every
        schedule; entry 0 is taken as 1.
      attention_kind: "sparse", or "dense" for all visible keys, the stage of
        training before sparsity.
      logits_for: "all" tokens, or each row's "last" real one (U = 1), which
        spares the T x vocab_size array of a long prefill.

    Returns:
      Float32 logits and the auxiliary record. Memory: linear in T and S; the
      kernels chunk what is T x S.
    """
    self._check(tokens, segment_ids, cache, runtime_schedule, attention_kind)
    context = attention.make_context(
      self.config,
      tokens,
      segment_ids,
      None if cache is None else cache.lengths,
    )
    hidden = self.embed(tokens)
    index, states, inputs, caches = None, [], [], []
    for layer, block in enumerate(self.layers):
      if runtime_schedule is None:
        is_full = self.config.schedule.is_full(layer)
      else:
        is_full = runtime_schedule[layer]
      hidden, index, layer_cache, layer_inputs = block(
        hidden,
        context,
        index,
        _layer_cache(cache, self.config.schedule, layer),
        is_full,
        attention_kind,
      )
      states.append(index)
      inputs.append(layer_inputs)
      caches.append(layer_cache)
    if lengths is None:
      lengths = jnp.full(tokens.shape[:1], tokens.shape[1])
    lengths = lengths.astype(jnp.int32)
    if logits_for == "last":
      hidden = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    aux = Aux(
      topk_indices=tuple(state.topk_indices for state in states),
      index_states=tuple(states),
      attention_inputs=tuple(inputs),
      key_start=context.key_start,
      key_end=context.key_end,
      cache=_join_cache(cache, caches, lengths),
    )
    return self.logits(hidden), aux

  def embed(self, tokens: types.Tokens) -> types.Hidden:
    """Returns the input of layer 0."""
    return self.embed_tokens(tokens).astype(self.config.dtype)

  def logits(self, hidden: types.Hidden) -> Float32[Array, "B T vocab"]:
    """Returns the logits of the last layer's output."""
    return jnp.einsum(
      "bth,hv->btv",
      self.norm(hidden),
      self.lm_head(),
      preferred_element_type=jnp.float32,
      precision=numerics.precision(self.config.dtype),
    )

  def _check(self, tokens, segment_ids, cache, runtime_schedule, kind):
    if segment_ids is not None and cache is not None:
      raise ValueError(
        "`segment_ids` must be None with a `cache`, which holds one sequence a"
        f" row: got segment_ids of shape {segment_ids.shape}. Give each segment"
        " a row of its own."
      )
    if cache is not None and tokens.shape[1] > cache.capacity:
      raise ValueError(
        "`tokens` must fit in `cache`: got"
        f" {tokens.shape[1]} tokens for a capacity of {cache.capacity}. Make"
        " the cache larger with `init_cache`."
      )
    if runtime_schedule is None:
      return
    schedule = self.config.schedule
    if schedule.num_shared:
      raise ValueError(
        "`runtime_schedule` needs an indexer in every layer: got a config whose"
        f" schedule is {schedule.pattern!r}. Load the checkpoint under the all"
        "-full schedule."
      )
    if runtime_schedule.shape != (schedule.num_layers,):
      raise ValueError(
        "`runtime_schedule` must have one entry a layer: got shape"
        f" {runtime_schedule.shape} for {schedule.num_layers} layers."
      )
    if cache is not None or kind == "dense":
      raise ValueError(
        "`runtime_schedule` evaluates whole sequences under sparse attention:"
        f" got attention_kind={kind!r} and"
        f" {'a' if cache is not None else 'no'} cache. Put the schedule into"
        " the config with `config.replace(schedule=...)`."
      )


def _layer_cache(cache, schedule, layer):
  if cache is None:
    return None
  if not schedule.is_full(layer):
    return attention.LayerCache(cache.kv_latent[layer], None)
  place = schedule.full_layers.index(layer)
  return attention.LayerCache(
    cache.kv_latent[layer],
    cache.index_keys[place],
    cache.index_key_scales[place] if cache.index_key_scales else None,
  )


def _join_cache(cache, layer_caches, lengths):
  if cache is None:
    return None

  def present(arrays):
    return tuple(array for array in arrays if array is not None)

  return cache_lib.Cache(
    kv_latent=tuple(layer.kv_latent for layer in layer_caches),
    index_keys=present(layer.index_keys for layer in layer_caches),
    index_key_scales=present(layer.index_key_scales for layer in layer_caches),
    lengths=cache.lengths + lengths,
  )
