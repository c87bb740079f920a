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

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

import pallas_kernels
from indexcache_jax import attention, types
from indexcache_jax import config as config_lib
from indexcache_jax import model as model_lib
from pallas_kernels import chunking

# Jitted for their lowering, which layers of one shape then share: that of a
# Mosaic GPU kernel takes half a second.
_sparse_mla = jax.jit(
  pallas_kernels.sparse_mla,
  static_argnames=("scale", "value_dim", "implementation", "return_residuals"),
)
_selected_indexer_scores = jax.jit(
  pallas_kernels.selected_indexer_scores, static_argnames=("implementation",)
)
_dense_mla_residuals = jax.jit(
  pallas_kernels.dense_mla_residuals, static_argnames=("scale",)
)
_indexer_scores = jax.jit(pallas_kernels.indexer_scores)


def distillation_loss(
  aux: model_lib.Aux,
  config: config_lib.SparseTransformerConfig,
  *,
  multi_layer: bool = True,
  layer_weights: Sequence[float] | None = None,
  renormalise: bool = True,
  where: Bool[Array, "B T"] | None = None,
) -> Float32[Array, ""]:
  """Returns the loss of one forward pass, summed over full layers.

  Args:
    aux: of a static schedule. Where it holds a selection the loss is stage
      2's, over the selected keys; after a dense pass it is stage 1's.
    config: of the model; its schedule says who serves whom.
    multi_layer: average over all served layers; else a full layer learns from
      its own attention alone, as public trainers do.
    layer_weights: of each layer's KL, in place of the equal weights that
      `multi_layer` gives. The gradient is that of one teacher, the weighted
      sum of the served layers' attention, where a group's weights sum to 1,
      which nothing here sees to.
    renormalise: in stage 2, whether both sides are distributions over the
      selected keys; see `selected_index_kl`.
    where: tokens that count; None: all.

  Raises:
    ValueError: `layer_weights` of another length, or below 0.
  """
  if layer_weights is None:
    layer_weights = equal_weights(config, multi_layer=multi_layer)
  _check_weights(layer_weights, config)
  total = jnp.zeros((), jnp.float32)
  for layer, weight in enumerate(layer_weights):
    if weight:
      kl = layer_kl(aux, config, layer, renormalise=renormalise)
      total += weight * _masked_mean(kl, where)
  return total


def equal_weights(
  config: config_lib.SparseTransformerConfig, *, multi_layer: bool
) -> tuple[float, ...]:
  """The paper's weights of the layers: `1 / |g(f)|`, or own layers alone."""
  schedule = config.schedule
  if not multi_layer:
    return tuple(
      float(schedule.is_full(layer)) for layer in range(schedule.num_layers)
    )
  return tuple(
    1 / len(schedule.served_layers(source)) for source in schedule.source_layers
  )


def layer_kl(
  aux: model_lib.Aux,
  config: config_lib.SparseTransformerConfig,
  layer: int,
  *,
  renormalise: bool = True,
) -> Float32[Array, "B T"]:
  """KL of a layer's attention from its source layer's indexer, in nats.

  Args:
    aux: see `distillation_loss`.
    config: of the model.
    layer: that attends.
    renormalise: see `selected_index_kl`.
  """
  state = aux.index_states[layer]
  if state.index_q is None:
    raise ValueError(
      f"`aux` must hold the indexer's outputs of layer {layer}: got None, as a"
      " run-time schedule leaves them. Run the model with the schedule in its"
      " config."
    )
  inputs = aux.attention_inputs[layer]
  if state.topk_indices is not None and renormalise:
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
  """KL of distributions over all visible keys: stage 1, or not renormalised.

  Where the state holds a selection, the sum is over the selected keys alone.

  Memory: a few arrays of at most 128 MiB, of a chunk of queries by all keys,
  recomputed in the backward pass; neither teacher nor scores are kept.
  """
  query, kv_latent = jax.lax.stop_gradient(inputs)

  def chunk_kl(query, index_q, index_weights, key_start, key_end, *selected):
    _, teacher = _dense_mla_residuals(
      query, kv_latent, key_start, key_end, scale=scale
    )
    scores = _indexer_scores(
      index_q, state.index_k, index_weights, key_start, key_end
    )
    log_student = _masked_log_softmax(scores)
    for indices in selected:
      log_student = jnp.take_along_axis(log_student, indices, axis=-1)
      teacher = jnp.take_along_axis(teacher, indices, axis=-1)
      # Index -1 has read the last key.
      teacher = jnp.where(indices >= 0, teacher, 0.0)
    return kl_divergence(log_student, teacher)

  selected = () if state.topk_indices is None else (state.topk_indices,)
  return chunking.map_query_chunks(
    chunk_kl,
    (
      query,
      state.index_q,
      state.index_weights,
      key_start,
      key_end,
      *selected,
    ),
    bytes_per_query=4 * query.shape[0] * kv_latent.shape[1],
  )


def selected_index_kl(
  inputs: attention.AttentionInputs,
  state: attention.IndexState,
  config: config_lib.SparseTransformerConfig,
) -> Float32[Array, "B T"]:
  """Stage 2: KL over the selected keys, both sides normalised over them.

  The teacher is the sparse attention itself, at its cost. Not renormalised,
  both sides are distributions over all visible keys, at the cost of dense
  attention: then the mass of the keys that were not selected counts too.

  Memory: two T x K arrays a layer are kept for the backward pass, teacher and
  scores, of the size of the selection itself.
  """
  query, kv_latent = jax.lax.stop_gradient(inputs)
  _, residuals = _sparse_mla(
    query,
    kv_latent,
    state.topk_indices,
    scale=config.attention_scale,
    value_dim=config.kv_lora_rank,
    implementation=config.implementation,
    return_residuals=True,
  )
  scores = _selected_indexer_scores(
    state.index_q,
    state.index_k,
    state.index_weights,
    state.topk_indices,
    implementation=config.implementation,
  )
  return _selected_kl(scores, residuals.mean_probs)


@jax.checkpoint
def _selected_kl(scores, teacher):
  """Recomputed, lest each layer keep the logarithms of both."""
  return kl_divergence(_masked_log_softmax(scores), teacher)


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


def _check_weights(layer_weights, config):
  if len(layer_weights) != config.num_hidden_layers or not all(
    0 <= weight < float("inf") for weight in layer_weights
  ):
    raise ValueError(
      "`layer_weights` must be finite numbers of 0 or more, one a layer: got"
      f" {list(layer_weights)} for"
      f" num_hidden_layers={config.num_hidden_layers}. None gives the paper's."
    )


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
