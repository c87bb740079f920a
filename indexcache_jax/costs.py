# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a schedule saves: operations, bytes, and predicted time.

A multiplication and an addition are two floating-point operations (FLOPs).
Counted are matrix products, which is nearly all; norms, softmax, RoPE and the
selection itself are not.
"""

import dataclasses

import jax.numpy as jnp

from indexcache_jax import config as config_lib
from indexcache_jax import schedule as schedule_lib

SparseTransformerConfig = config_lib.SparseTransformerConfig
ReuseSchedule = schedule_lib.ReuseSchedule


@dataclasses.dataclass(frozen=True)
class IndexerCosts:
  """Costs of one layer's indexer.

  Attributes:
    parameters: wq_b, wk, weights_proj and the key norm's scale and bias.
    projection_flops: a token, for its index queries, key and weights.
    score_flops: a pair of query and visible key, `2 I D`.
    key_bytes: a cached token.
  """

  parameters: int
  projection_flops: int
  score_flops: int
  key_bytes: int


def indexer_costs(
  config: SparseTransformerConfig, *, key_bytes: int | None = None
) -> IndexerCosts:
  """Returns the costs of one indexer.

  Args:
    config: of the model.
    key_bytes: of an index key, 132 for the engines' FP8 with its scale; None:
      as `Cache` keeps it, see `config.index_key_dtype`.
  """
  heads, dim = config.index_n_heads, config.index_head_dim
  kernels = (
    config.q_lora_rank * heads * dim
    + config.hidden_size * dim
    + config.hidden_size * heads
  )
  if key_bytes is None:
    key_bytes = config.index_key_bytes
  return IndexerCosts(
    parameters=kernels + 2 * dim,
    projection_flops=2 * kernels,
    score_flops=2 * heads * dim,
    key_bytes=key_bytes,
  )


@dataclasses.dataclass(frozen=True)
class PhaseFlops:
  """FLOPs of one sequence's prefill, or of one token's decoding.

  Attributes:
    indexer: of the full layers' indexers.
    attention: core attention of all layers to their selected keys.
    rest: projections and MLPs of all layers, and the head.
    indexer_all_full: what `indexer` would be without reuse.
  """

  indexer: int
  attention: int
  rest: int
  indexer_all_full: int

  @property
  def total(self) -> int:
    """Of the model under the schedule."""
    return self.indexer + self.attention + self.rest

  @property
  def ratio(self) -> float:
    """FLOPs without reuse over those under the schedule."""
    return (self.total - self.indexer + self.indexer_all_full) / self.total


@dataclasses.dataclass(frozen=True)
class ScheduleCosts:
  """Costs of a model under a schedule at one context.

  Attributes:
    prefill: of a sequence of `context` tokens.
    decode: of the token that makes a sequence `context` tokens long.
    indexer_parameters: of the full layers.
    index_key_bytes: a token, of the full layers.
    kv_latent_bytes: a token, of all layers.
    indexer_compute_removed: share of the indexers' FLOPs that reuse saves.
    index_key_bytes_removed: share of the index keys' bytes that it saves.
  """

  prefill: PhaseFlops
  decode: PhaseFlops
  indexer_parameters: int
  index_key_bytes: int
  kv_latent_bytes: int
  indexer_compute_removed: float
  index_key_bytes_removed: float

  @property
  def cache_bytes(self) -> int:
    """A token, latents and index keys."""
    return self.kv_latent_bytes + self.index_key_bytes


def schedule_costs(
  config: SparseTransformerConfig,
  schedule: ReuseSchedule | None = None,
  *,
  context: int,
  key_bytes: int | None = None,
  latent_bytes: int | None = None,
) -> ScheduleCosts:
  """Returns what the model costs under a schedule.

  Args:
    config: of the model.
    schedule: None: `config.schedule`.
    context: tokens of the sequence, at least 1.
    key_bytes: of an index key, see `indexer_costs`.
    latent_bytes: of a latent row; None: its elements in `config.dtype`.

  Raises:
    ValueError: for a schedule of another length or an empty context.
  """
  schedule = config.schedule if schedule is None else schedule
  if schedule.num_layers != config.num_hidden_layers or context < 1:
    raise ValueError(
      "`schedule` must have one entry a layer and `context` be at least 1: got"
      f" {schedule.num_layers} entries for"
      f" num_hidden_layers={config.num_hidden_layers}, context={context}."
    )
  indexer = indexer_costs(config, key_bytes=key_bytes)
  num_layers, num_full = schedule.num_layers, schedule.num_full
  if latent_bytes is None:
    latent_bytes = config.latent_dim * jnp.dtype(config.dtype).itemsize
  share = schedule.num_shared / num_layers
  return ScheduleCosts(
    prefill=_phase_flops(
      config, schedule, context, _prefill_pairs(context), context
    ),
    decode=_phase_flops(config, schedule, 1, context, context),
    indexer_parameters=num_full * indexer.parameters,
    index_key_bytes=num_full * indexer.key_bytes,
    kv_latent_bytes=num_layers * latent_bytes,
    # All indexers are of one size, so both are the share of shared layers.
    indexer_compute_removed=share,
    index_key_bytes_removed=share,
  )


def _prefill_pairs(context):
  """Pairs of a query and a key visible to it, causally."""
  return context * (context + 1) // 2


def _phase_flops(config, schedule, num_tokens, pairs, context):
  """Of `num_tokens` queries that see `pairs` keys in all."""
  indexer = indexer_costs(config)
  one = num_tokens * indexer.projection_flops + pairs * indexer.score_flops
  topk = min(config.index_topk, context)
  # Of the queries of a prefill, the first ones see fewer than K keys.
  selected = num_tokens * topk
  if num_tokens > 1:
    selected -= topk * (topk - 1) // 2
  widths = config.latent_dim + config.kv_lora_rank
  attention = 2 * config.num_attention_heads * widths * selected
  layers = sum(
    projection_flops(config) + mlp_flops(config, use_experts=kind == "sparse")
    for kind in config.mlp_layer_types
  )
  head = 2 * config.hidden_size * config.vocab_size  # Of the last token only.
  return PhaseFlops(
    indexer=schedule.num_full * one,
    attention=schedule.num_layers * attention,
    rest=num_tokens * layers + head,
    indexer_all_full=schedule.num_layers * one,
  )


def projection_flops(config: SparseTransformerConfig) -> int:
  """FLOPs a token and layer of attention's projections, absorbed form."""
  heads = config.num_attention_heads
  return 2 * (
    config.hidden_size * (config.q_lora_rank + config.latent_dim)
    + config.q_lora_rank * heads * config.qk_head_dim
    + heads * config.kv_lora_rank * config.qk_nope_head_dim
    + heads * config.kv_lora_rank * config.v_head_dim
    + heads * config.v_head_dim * config.hidden_size
  )


def mlp_flops(config: SparseTransformerConfig, *, use_experts: bool) -> int:
  """FLOPs a token and layer of a dense or sparse MLP, router included."""
  hidden = config.hidden_size
  if not use_experts:
    return 6 * hidden * config.intermediate_size
  experts = config.num_experts_per_tok + config.n_shared_experts
  return (
    6 * hidden * config.moe_intermediate_size * experts
    + 2 * hidden * config.n_routed_experts
  )
