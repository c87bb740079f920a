# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How much layers agree on the keys that matter.

Every matrix has the layer that reads in its row and the layer whose indices it
reads in its column; entry [l, l] is a layer under its own indices. Positions
count where a query sees more than K keys: below, every layer selects all of
them, and agreement is 1 whatever the indexers do.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

import pallas_kernels
from indexcache_jax import config as config_lib
from indexcache_jax import dense_mla
from indexcache_jax import observation as observation_lib
from pallas_kernels import chunking, numerics

Observation = observation_lib.Observation
observe = observation_lib.observe


def topk_overlap(
  topk_indices: Sequence[Int32[Array, "B P K"]], *, per_position: bool = False
) -> Float32[Array, "*P L L"]:
  """`|selected_l & selected_j| / |selected_l|`, a matrix of all pairs.

  Section 3 of the paper (arXiv 2603.12201) maps it over a model's layers.

  Args:
    topk_indices: of each layer, no index twice, -1 for none. A query that
      selects nothing counts as 0.
    per_position: one matrix a position, the mean over sequences; otherwise
      the mean over both.

  Returns:
    Matrices. Memory: chunks of 128 MiB; nothing of P x S beyond.
  """
  num_keys = 1 + max(int(jnp.max(indices)) for indices in topk_indices)
  stacked = jnp.stack(topk_indices, axis=2)
  rows = [
    _mean(_overlap_row(indices, stacked, max(num_keys, 1)), per_position)
    for indices in topk_indices
  ]
  return jnp.stack(rows, axis=-2)


def shared_rows(
  topk_indices: Sequence[Int32[Array, "B P K"]], together: int
) -> Float32[Array, " L"]:
  """Distinct keys of neighbouring queries, as a share of all that they select.

  1: they have none in common; 1 / together: all. `sparse_mla` with
  `shares_rows` reads that share.

  Args:
    topk_indices: of each layer, at consecutive positions; no index twice a
      query, -1 for none.
    together: queries of a group; those beyond the last whole group are left
      out.

  Raises:
    ValueError: fewer positions than a group has.
  """
  batch, positions, _ = topk_indices[0].shape
  groups = positions // together
  if not 1 <= together <= positions:
    raise ValueError(
      "`together` must be 1 to the number of positions: got"
      f" {together} for {positions}. Observe longer sequences."
    )

  def share(indices):
    indices = indices[:, : groups * together]
    merged = jnp.sort(indices.reshape(batch, groups, -1), axis=-1)
    is_new = jnp.diff(merged, axis=-1, prepend=-1) > 0
    return jnp.sum(is_new) / jnp.maximum(jnp.sum(merged >= 0), 1)

  return jnp.stack([share(indices) for indices in topk_indices])


def attention_recall(
  observation: Observation, *, scale: float, per_position: bool = False
) -> Float32[Array, "*P L L"]:
  """Attention mass of layer l on the keys that layer j selected.

  Mass is the head-averaged softmax of layer l over all visible keys, which is
  1 in all; the diagonal says how much of it the layer's own indexer finds.

  Args:
    observation: from `observe`.
    scale: `config.attention_scale`.
    per_position: as in `topk_overlap`.

  Returns:
    Matrices. Memory: chunks of 128 MiB; nothing of P x S beyond.
  """
  stacked = jnp.stack(observation.topk_indices, axis=2)
  rows = [
    _mean(
      _recall_row(
        inputs, stacked, observation.key_start, observation.key_end, scale
      ),
      per_position,
    )
    for inputs in observation.attention_inputs
  ]
  return jnp.stack(rows, axis=-2)


def output_similarity(
  observation: Observation,
  config: config_lib.SparseTransformerConfig,
  params: dict,
) -> Float32[np.ndarray, "L L"]:
  """Cosine of layer l's attention outputs under its own and j's indices.

  The output is what `o_proj` reads, all heads of a token in one vector; the
  mean over tokens. Appendix C of the paper; above the diagonal 0, for a layer
  cannot use the indices of a later one.

  Args:
    observation: from `observe`.
    config: of the model.
    params: for the value half of `kv_b_proj`.
  """
  num_layers = len(observation.topk_indices)
  similarity = np.zeros((num_layers, num_layers), np.float32)
  for layer, inputs in enumerate(observation.attention_inputs):
    kernel = params[f"layers_{layer}"]["self_attn"]["kv_b_proj"]["kernel"]
    own = _heads(config, inputs, observation.topk_indices[layer], kernel)
    for source in range(layer + 1):
      other = _heads(config, inputs, observation.topk_indices[source], kernel)
      similarity[layer, source] = _mean_cosine(own, other)
  return similarity


def model_overlap(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  batches: Iterable[Int[Array, "B T"] | Int[np.ndarray, "B T"]],
  positions: Sequence[int] | None = None,
) -> Float32[np.ndarray, "*P L L"]:
  """`topk_overlap` of a model, the mean over batches.

  Args:
    config: all full.
    params: of the model.
    batches: tokens; M batches of B sequences.
    positions: one matrix for each of these; None: one over all that see more
      than K keys.
  """
  return _mean_over_batches(
    lambda observation: topk_overlap(
      observation.topk_indices, per_position=positions is not None
    ),
    (observe(config, params, tokens, positions) for tokens in batches),
  )


def model_shared_rows(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  batches: Iterable[Int[Array, "B T"] | Int[np.ndarray, "B T"]],
  together: Sequence[int],
) -> Float32[np.ndarray, "G L"]:
  """`shared_rows` of a model for groups of each size, the mean over batches."""
  return _mean_over_batches(
    lambda observation: jnp.stack(
      [shared_rows(observation.topk_indices, size) for size in together]
    ),
    (observe(config, params, tokens) for tokens in batches),
  )


def model_recall(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  batches: Iterable[Int[Array, "B T"] | Int[np.ndarray, "B T"]],
  positions: Sequence[int] | None = None,
) -> Float32[np.ndarray, "*P L L"]:
  """`attention_recall` of a model; arguments as of `model_overlap`."""
  return _mean_over_batches(
    lambda observation: attention_recall(
      observation,
      scale=config.attention_scale,
      per_position=positions is not None,
    ),
    (observe(config, params, tokens, positions) for tokens in batches),
  )


def attention_similarity(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  batches: Iterable[Int[Array, "B T"] | Int[np.ndarray, "B T"]],
) -> Float32[np.ndarray, "L L"]:
  """`output_similarity` of a model, the mean over batches.

  The matrix of `dp_schedule`. Positions where all selections agree, left out
  here, would move all entries towards 1 alike: the optimum stays the same.
  """
  return _mean_over_batches(
    lambda observation: output_similarity(observation, config, params),
    (observe(config, params, tokens) for tokens in batches),
  )


def _mean_over_batches(function, observations):
  matrices = [np.asarray(function(x), np.float64) for x in observations]
  if not matrices:
    raise ValueError("`batches` must hold at least one batch: got none.")
  return np.mean(matrices, axis=0).astype(np.float32)


def _mean(values, per_position):
  return jnp.mean(values, axis=0 if per_position else (0, 1))


@functools.partial(jax.jit, static_argnums=(2,))
def _overlap_row(indices, stacked, num_keys):
  """[B, P, L]: share of one layer's selection in each layer's."""

  def chunk_overlap(indices, stacked):
    batch, rows = np.ogrid[: indices.shape[0], : indices.shape[1]]
    # Beyond the last key, where the scatter drops it.
    places = jnp.where(indices < 0, num_keys, indices)
    is_selected = jnp.zeros((*indices.shape[:2], num_keys))
    is_selected = is_selected.at[batch[..., None], rows[..., None], places].set(
      1.0, mode="drop"
    )
    size = jnp.sum(indices >= 0, axis=-1, keepdims=True)
    return _held(is_selected, stacked) / jnp.maximum(size, 1)

  return chunking.map_query_chunks(
    chunk_overlap,
    (indices, stacked),
    bytes_per_query=4 * max(num_keys, stacked[0, 0].size) * len(indices),
  )


@functools.partial(jax.jit, static_argnums=(4,))
def _recall_row(inputs, stacked, key_start, key_end, scale):
  """[B, P, L]: one layer's attention mass that each layer's indices hold."""
  query, kv_latent = inputs

  def chunk_recall(query, stacked, key_start, key_end):
    probs = dense_mla.head_probs(
      query, kv_latent, key_start, key_end, scale=scale
    )
    return _held(jnp.mean(probs, axis=2), stacked)

  per_head = query.shape[2] * kv_latent.shape[1]
  return chunking.map_query_chunks(
    chunk_recall,
    (query, stacked, key_start, key_end),
    bytes_per_query=4 * max(per_head, stacked[0, 0].size) * len(query),
  )


def _held(mass: Float[Array, "B P S"], stacked: Int32[Array, "B P L K"]):
  """[B, P, L]: mass on the keys of each selection."""
  found = jnp.take_along_axis(
    mass[:, :, None], jnp.maximum(stacked, 0), axis=-1
  )
  return jnp.sum(jnp.where(stacked < 0, 0.0, found), axis=-1)


@functools.partial(jax.jit, static_argnums=(0,))
def _heads(config, inputs, topk_indices, kernel) -> Float32[Array, "B P H"]:
  """What `o_proj` reads under some layer's indices."""
  attended = pallas_kernels.sparse_mla(
    inputs.query,
    inputs.kv_latent,
    topk_indices,
    scale=config.attention_scale,
    value_dim=config.kv_lora_rank,
    implementation=config.implementation,
  )
  heads = config.num_attention_heads
  value_up = kernel.reshape(config.kv_lora_rank, heads, -1)
  outputs = jnp.einsum(
    "btnv,vnd->btnd",
    attended,
    value_up[..., config.qk_nope_head_dim :].astype(attended.dtype),
    preferred_element_type=jnp.float32,
    precision=numerics.precision(config.dtype),
  )
  return outputs.reshape(*outputs.shape[:2], -1)


@jax.jit
def _mean_cosine(a, b):
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30))
