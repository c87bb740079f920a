# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Language-model loss of many schedules, layer by layer.

A search asks for the loss of schedules that differ from the committed one in
one layer. All activations below that layer are the committed schedule's, so
they are kept and the evaluation starts there: the same operations on the same
arrays, hence the same bits. Layers of one kind are one compiled function, so
no schedule compiles anything new.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from indexcache_jax import attention, decoder
from indexcache_jax import config as config_lib
from indexcache_jax import model as model_lib
from indexcache_jax import schedule as schedule_lib


class LayerwiseLoss:
  """Mean next-token loss of a schedule on fixed batches, in nats a token.

  A callable from `ReuseSchedule` to float for `greedy_search`, with the
  `set_base` that spares it the shared prefix. Runs wherever the parameters
  are; sharded parameters stay sharded.

  Attributes:
    layer_forwards: layers run so far, a batch counting as a fraction, so that
      one full evaluation is `num_layers`.
  """

  def __init__(
    self,
    config: config_lib.SparseTransformerConfig,
    params: dict,
    batches: Int[Array, "M B T"] | Int[np.ndarray, "M B T"],
  ):
    """Keeps references to the parameters and places the batches.

    Args:
      config: of a model with an indexer in every layer.
      params: its parameters.
      batches: token ids of M batches of B sequences; a sequence predicts its
        own T - 1 next tokens. Memory: for each batch and layer one hidden
        state and one selection.
    """
    if config.schedule.num_shared:
      raise ValueError(
        "`config.schedule` must be all full, since a search flips any layer:"
        f" got {config.schedule.pattern!r}. Load the full checkpoint under"
        " `ReuseSchedule.all_full`."
      )
    self.config = config
    self.layer_forwards = 0.0
    self._params = params
    self._model = model_lib.SparseTransformer(config)
    self._batches = [jnp.asarray(batch, jnp.int32) for batch in batches]
    self._contexts = [
      attention.make_context(config, batch) for batch in self._batches
    ]
    self._base: schedule_lib.ReuseSchedule | None = None
    # States by batch, then by layer: what enters that layer.
    self._states = [[_embed(self._model, params, b)] for b in self._batches]

  def __call__(self, schedule: schedule_lib.ReuseSchedule) -> float:
    """Returns the loss of `schedule`, starting where it leaves the base."""
    losses = [
      self._batch_loss(index, schedule) for index in range(len(self._batches))
    ]
    return float(np.mean(losses, dtype=np.float64))

  def token_losses(
    self, schedule: schedule_lib.ReuseSchedule
  ) -> Float32[np.ndarray, "M B T-1"]:
    """Returns the loss of every predicted token."""
    return np.stack(
      [
        np.asarray(self._token_losses(index, schedule))
        for index in range(len(self._batches))
      ]
    )

  def set_base(self, schedule: schedule_lib.ReuseSchedule) -> None:
    """Keeps the activations of `schedule`, reusing those of the last base."""
    start = self._first_difference(schedule)
    for index in range(len(self._batches)):
      del self._states[index][start + 1 :]
      for state in self._run(index, schedule, start):
        self._states[index].append(state)
    self._base = schedule

  def _batch_loss(self, index, schedule):
    return float(jnp.mean(self._token_losses(index, schedule)))

  def _token_losses(self, index, schedule):
    start = self._first_difference(schedule)
    last = collections.deque(self._run(index, schedule, start), maxlen=1)
    state = last[0] if last else self._states[index][-1]
    return _token_losses(
      self._model, self._params, state[0], self._batches[index]
    )

  def _first_difference(self, schedule):
    if self._base is None:
      return 0
    pairs = zip(self._base.pattern, schedule.pattern, strict=True)
    differing = (layer for layer, (a, b) in enumerate(pairs) if a != b)
    return next(differing, schedule.num_layers)

  def _run(self, index, schedule, start):
    """Yields what leaves each layer from `start` on."""
    state = self._states[index][start]
    for layer in range(start, schedule.num_layers):
      block = decoder.DecoderLayer(
        self.config, use_experts=self.config.is_sparse_mlp(layer)
      )
      state = _run_layer(
        block,
        self._params[f"layers_{layer}"],
        state,
        self._contexts[index],
        schedule.is_full(layer),
      )
      self.layer_forwards += 1 / len(self._batches)
      yield state


@functools.partial(jax.jit, static_argnums=(0,))
def _embed(model, params, tokens):
  hidden = model.apply({"params": params}, tokens, method="embed")
  return hidden, None


@functools.partial(jax.jit, static_argnums=(0, 4))
def _run_layer(block, params, state, context, is_full):
  hidden, topk_indices = state
  index = None
  if topk_indices is not None:
    index = attention.IndexState(topk_indices)
  hidden, index, _, _ = block.apply(
    {"params": params}, hidden, context, index, None, is_full
  )
  return hidden, index.topk_indices


@functools.partial(jax.jit, static_argnums=(0,))
def _token_losses(model, params, hidden, tokens):
  logits = model.apply({"params": params}, hidden, method="logits")
  return next_token_losses(logits, tokens)


def next_token_losses(
  logits: Float32[Array, "B T vocab"],
  tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"],
) -> Float32[Array, "B T-1"]:
  """Cross entropy of each token given those before it, in nats."""
  log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
  targets = tokens[:, 1:, None]
  return -jnp.take_along_axis(log_probs, targets, axis=-1)[..., 0]
