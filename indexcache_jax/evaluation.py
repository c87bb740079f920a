# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a schedule costs: held-out loss, and recall of hidden facts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from indexcache_jax import config as config_lib
from indexcache_jax import layerwise, needles
from indexcache_jax import model as model_lib


class NeedleRecall(NamedTuple):
  """Share of hidden facts that were recalled.

  Attributes:
    exact: share of answers right in every token.
    by_depth: (depth, share) in order of depth.
  """

  exact: float
  by_depth: tuple[tuple[float, float], ...]


def held_out_loss(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  batches: Int32[np.ndarray, "M B T"],
) -> float:
  """Mean next-token loss under `config.schedule`, in nats a token."""
  losses = [
    float(_mean_loss(config, params, jnp.asarray(batch))) for batch in batches
  ]
  return float(np.mean(losses, dtype=np.float64))


def needle_recall(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  batch: needles.NeedleBatch,
  *,
  batch_size: int = 8,
) -> NeedleRecall:
  """Asks for each hidden fact and counts the answers that are right.

  An answer is right if each of its tokens is the likeliest one after the
  prompt and the right tokens before it; that equals greedy generation, for a
  generated answer is right as long as its tokens so far are.
  """
  right = []
  for start in range(0, len(batch.prompts), batch_size):
    prompts = batch.prompts[start : start + batch_size]
    answers = batch.answers[start : start + batch_size]
    tokens = jnp.asarray(np.concatenate([prompts, answers], axis=1))
    right.append(
      np.asarray(_answers_right(config, answers.shape[1], params, tokens))
    )
  right = np.concatenate(right)
  depths = np.unique(batch.depths)
  return NeedleRecall(
    exact=float(np.mean(right)),
    by_depth=tuple(
      (float(depth), float(np.mean(right[batch.depths == depth])))
      for depth in depths
    ),
  )


@functools.partial(jax.jit, static_argnums=(0,))
def _mean_loss(config, params, tokens) -> Float32[Array, ""]:
  logits, _ = model_lib.SparseTransformer(config).apply(
    {"params": params}, tokens
  )
  return jnp.mean(layerwise.next_token_losses(logits, tokens))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answers_right(config, answer_length, params, tokens) -> Bool[Array, " B"]:
  logits, _ = model_lib.SparseTransformer(config).apply(
    {"params": params}, tokens
  )
  guesses = jnp.argmax(logits[:, -answer_length - 1 : -1], axis=-1)
  return jnp.all(guesses == tokens[:, -answer_length:], axis=-1)
