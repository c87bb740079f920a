# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the layers of a model attend to, gathered for the analysis."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from indexcache_jax import attention
from indexcache_jax import config as config_lib
from indexcache_jax import model as model_lib


class Observation(NamedTuple):
  """What the layers of the all-full model attended to, at some positions.

  P positions of the T tokens.

  Attributes:
    topk_indices: the selection of each layer.
    attention_inputs: queries at the positions and all latent rows, by layer.
    key_start: first visible key of the positions.
    key_end: one past the last visible key.
  """

  topk_indices: tuple[Int32[Array, "B P K"], ...]
  attention_inputs: tuple[attention.AttentionInputs, ...]
  key_start: Int32[Array, "B P"]
  key_end: Int32[Array, "B P"]


def observe(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"],
  positions: Sequence[int] | None = None,
) -> Observation:
  """Runs the all-full model and keeps what the analysis reads.

  Memory: for each layer P queries of N x C and all T latent rows, so choose
  positions for a long context.

  Args:
    config: all full.
    params: of the model.
    tokens: a batch.
    positions: queries to keep; None: all that see more than K keys.

  Raises:
    ValueError: if a layer has no indexer, or the positions are not informative.
  """
  if config.schedule.num_shared:
    raise ValueError(
      "`config.schedule` must be all full to compare the layers' indices: got"
      f" {config.schedule.pattern!r}. Load the full checkpoint under"
      " `ReuseSchedule.all_full`."
    )
  length, num_selected = tokens.shape[1], config.index_topk
  if positions is None:
    positions = range(num_selected, length)
  if not positions or min(positions) < num_selected or max(positions) >= length:
    raise ValueError(
      f"`positions` must see more than index_topk={num_selected} keys, or all"
      f" selections agree: got {list(positions)} of {length} tokens; position p"
      " sees p + 1. Choose positions from index_topk on, in longer sequences if"
      " there are none."
    )
  return _observe(
    config,
    params,
    jnp.asarray(tokens, jnp.int32),
    jnp.asarray(positions, jnp.int32),
  )


@functools.partial(jax.jit, static_argnums=(0,))
def _observe(config, params, tokens, positions):
  _, aux = model_lib.SparseTransformer(config).apply(
    {"params": params}, tokens, logits_for="last"
  )
  return Observation(
    topk_indices=tuple(x[:, positions] for x in aux.topk_indices),
    attention_inputs=tuple(
      inputs._replace(query=inputs.query[:, positions])
      for inputs in aux.attention_inputs
    ),
    key_start=aux.key_start[:, positions],
    key_end=aux.key_end[:, positions],
  )
