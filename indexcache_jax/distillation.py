# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses that teach an indexer which keys the layers it serves attend to.

IndexCache (arXiv 2603.12201), equation 1: for a full layer f serving g(f),

  loss = sum_{l in g(f)} 1/|g(f)| mean_t KL(p[l, t] || q[f, t])

with q the softmax of f's scores and p layer l's attention probabilities,
averaged over heads. p is never differentiated, and the indexer detaches its
inputs, so the loss trains indexers and nothing else. Stage 1 sums over all
visible keys under dense attention, stage 2 over the selected ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

import pallas_kernels
from indexcache_jax import attention, types
from indexcache_jax import config as config_lib
from indexcache_jax import model as model_lib
from pallas_kernels import chunking


def distillation_loss(
  aux: model_lib.Aux,
  config: config_lib.SparseTransformerConfig,
  *,
  multi_layer: bool = True,
  where: Bool[Array, "B T"] | None = None,
) -> Float32[Array, ""]:
  """Returns the loss of one forward pass, summed over full layers.

  Args:
    aux: of a static schedule. Where it holds a selection the loss is stage
      2's, over the selected keys; after a dense pass it is stage 1's.
    config: of the model; its schedule says who serves whom.
    multi_layer: average over all served layers; else a full layer learns from
      its own attention alone, as public trainers do.
    where: tokens that count; None: all.
  """
  schedule = config.schedule
  layers = range(schedule.num_layers) if multi_layer else schedule.full_layers
  total = jnp.zeros((), jnp.float32)
  for layer in layers:
    served = schedule.served_layers(schedule.source_layers[layer])
    weight = 1 / len(served) if multi_layer else 1.0
    total += weight * _masked_mean(layer_kl(aux, config, layer), where)
  return total


def layer_kl(
  aux: model_lib.Aux,
  config: config_lib.SparseTransformerConfig,
  layer: int,
) -> Float32[Array, "B T"]:
  """KL of a layer's attention from its source layer's indexer, in nats."""
  state = aux.index_states[layer]
  if state.index_q is None:
    raise ValueError(
      f"`aux` must hold the indexer's outputs of layer {layer}: got None, as a"
      " run-time schedule leaves them. Run the model with the schedule in its"
      " config."
    )
  inputs = aux.attention_inputs[layer]
  if state.topk_indices is not None:
    return selected_index_kl(inputs, state, config)
  return dense_index_kl(
    inputs, state, aux.key_start, aux.key_end, scale=config.attention_scale
  )


def dense_index_kl(
  inputs: attention.AttentionInputs,
  state: attention.IndexState,
  key_start: types.KeyBounds,
  key_end: types.KeyBounds,
  *,
  scale: float,
) -> Float32[Array, "B T"]:
  """Stage 1: KL over all visible keys.

  Memory: a few arrays of at most 128 MiB, of a chunk of queries by all keys,
  recomputed in the backward pass; neither teacher nor scores are kept.
  """
  query, kv_latent = jax.lax.stop_gradient(inputs)

  def chunk_kl(query, index_q, index_weights, key_start, key_end):
    _, teacher = pallas_kernels.dense_mla_residuals(
      query, kv_latent, key_start, key_end, scale=scale
    )
    scores = pallas_kernels.indexer_scores(
      index_q, state.index_k, index_weights, key_start, key_end
    )
    return kl_divergence(_masked_log_softmax(scores), teacher)

  return chunking.map_query_chunks(
    chunk_kl,
    (query, state.index_q, state.index_weights, key_start, key_end),
    bytes_per_query=4 * query.shape[0] * kv_latent.shape[1],
  )


def selected_index_kl(
  inputs: attention.AttentionInputs,
  state: attention.IndexState,
  config: config_lib.SparseTransformerConfig,
) -> Float32[Array, "B T"]:
  """Stage 2: KL over the selected keys, both sides normalised over them."""
  query, kv_latent = jax.lax.stop_gradient(inputs)
  _, residuals = pallas_kernels.sparse_mla(
    query,
    kv_latent,
    state.topk_indices,
    scale=config.attention_scale,
    value_dim=config.kv_lora_rank,
    implementation=config.implementation,
    return_residuals=True,
  )
  scores = pallas_kernels.selected_indexer_scores(
    state.index_q,
    state.index_k,
    state.index_weights,
    state.topk_indices,
    implementation=config.implementation,
  )
  return kl_divergence(_masked_log_softmax(scores), residuals.mean_probs)


def kl_divergence(
  log_predictions: Float[Array, "*B S"], targets: Float[Array, "*B S"]
) -> Float32[Array, "*B"]:
  """`sum_s targets (log targets - log_predictions)`; targets of 0 add 0."""
  targets = jax.lax.stop_gradient(targets)
  is_target = targets > 0
  # Where the target is 0 the prediction may be -inf: 0 * inf is NaN.
  gap = jnp.log(jnp.where(is_target, targets, 1.0)) - jnp.where(
    is_target, log_predictions, 0.0
  )
  return jnp.sum(targets * gap, axis=-1)


def _masked_log_softmax(scores):
  """Log-softmax over the keys whose score is not -inf."""
  is_key = scores > -jnp.inf
  safe = jnp.where(is_key, scores, jnp.finfo(jnp.float32).min)
  return jax.nn.log_softmax(safe, axis=-1)


def _masked_mean(values, where):
  if where is None:
    return jnp.mean(values)
  weights = where.astype(values.dtype)
  return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)
