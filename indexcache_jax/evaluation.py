# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a schedule costs: held-out loss, and answers about hidden facts."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from indexcache_jax import config as config_lib
from indexcache_jax import layerwise, long_context_tasks
from indexcache_jax import model as model_lib
from indexcache_jax import schedule as schedule_lib
from indexcache_jax import text as text_lib

# Answers are padded to it, so that all tasks run through one compilation.
_LONGEST_ANSWER = 16


class Accuracy(NamedTuple):
  """Share of hidden facts that were recalled.

  Attributes:
    exact: share of answers right in every token.
    by_depth: (depth, share) in order of depth.
  """

  exact: float
  by_depth: tuple[tuple[float, float], ...]


class TaskAccuracy(NamedTuple):
  """Accuracy on a task at one length.

  Attributes:
    task: its name.
    length: tokens of the sequences, answers included.
    count: answers.
    accuracy: of them.
  """

  task: str
  length: int
  count: int
  accuracy: Accuracy


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


def task_batches(
  tasks: Sequence[long_context_tasks.Task],
  tokens: Int32[np.ndarray, " tokens"],
  *,
  lengths: Sequence[int],
  depths: Sequence[float],
  count: int,
  seed: int,
) -> dict[tuple[str, int], long_context_tasks.TaskBatch]:
  """Hides facts in text, for each task and length `count` of them.

  Args:
    tasks: to generate.
    tokens: bytes of text, cut into windows at equal distances.
    lengths: of the sequences, answers included.
    depths: taken in turn.
    count: sequences of a task and length.
    seed: of facts and places; a batch depends on nothing else.

  Raises:
    ValueError: a length is too short for a task, or the text for a length.
  """
  batches = {}
  for task in tasks:
    for length in lengths:
      # A stream of their own, whatever else is asked for.
      rng = np.random.default_rng((seed, length, *task.name.encode()))
      [example] = task.facts(np.random.default_rng(0), 1)
      windows = text_lib.spread_windows(
        tokens, count, max(length - len(example.answer), 0)
      )
      batches[task.name, length] = long_context_tasks.task_batch(
        task, windows, rng, np.resize(depths, count)
      )
  return batches


def task_accuracies(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  batches: dict[tuple[str, int], long_context_tasks.TaskBatch],
  *,
  schedule: schedule_lib.ReuseSchedule | None = None,
  batch_size: int = 8,
) -> list[TaskAccuracy]:
  """Returns the accuracy of each of `task_batches`, in their order.

  All go through one compilation at the longest length, and all schedules of an
  all-full config through one more.

  Args:
    config: of the model.
    params: its parameters.
    batches: by name and length.
    schedule: in place of `config.schedule`, which must be all full; None:
      that one.
    batch_size: sequences at a time.
  """
  longest = max(length for _, length in batches)
  return [
    TaskAccuracy(
      name,
      length,
      len(batch.prompts),
      accuracy(
        config,
        params,
        batch,
        schedule=schedule,
        batch_size=batch_size,
        padded_length=longest,
      ),
    )
    for (name, length), batch in batches.items()
  ]


def accuracy(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  batch: long_context_tasks.TaskBatch,
  *,
  schedule: schedule_lib.ReuseSchedule | None = None,
  batch_size: int = 8,
  padded_length: int | None = None,
) -> Accuracy:
  """Asks for each hidden fact and counts the answers that are right.

  An answer is right if each of its tokens is the likeliest one after the
  prompt and the right tokens before it; that equals greedy generation, for a
  generated answer is right as long as its tokens so far are.

  Args:
    config: of the model.
    params: its parameters.
    batch: prompts and answers.
    schedule: see `task_accuracies`.
    batch_size: sequences at a time.
    padded_length: to which prompts and answers are padded at the right, where
      no token before sees; None: not at all.
  """
  if schedule is None:
    runtime_schedule = None
  else:
    runtime_schedule = jnp.array(
      [schedule.is_full(n) for n in range(schedule.num_layers)], jnp.int32
    )
  tokens = np.concatenate([batch.prompts, batch.answers], axis=1)
  prompt_length, end = batch.prompts.shape[1], tokens.shape[1]
  # The last batch is filled up with rows that are asked again.
  order = np.resize(
    np.arange(len(tokens)), -(-len(tokens) // batch_size) * batch_size
  )
  tokens = np.pad(tokens, ((0, 0), (0, (padded_length or end) - end)))
  places = prompt_length + np.arange(_LONGEST_ANSWER)
  is_answer = jnp.asarray(places < end)
  places = jnp.asarray(np.minimum(places, end - 1), jnp.int32)
  right = [
    np.asarray(
      _answers_right(
        config,
        params,
        jnp.asarray(tokens[rows]),
        places,
        is_answer,
        runtime_schedule,
      )
    )
    for rows in order.reshape(-1, batch_size)
  ]
  right = np.concatenate(right)[: len(batch.prompts)]
  return Accuracy(
    exact=float(np.mean(right)),
    by_depth=tuple(
      (float(depth), float(np.mean(right[batch.depths == depth])))
      for depth in np.unique(batch.depths)
    ),
  )


@functools.partial(jax.jit, static_argnums=(0,))
def _mean_loss(config, params, tokens) -> Float32[Array, ""]:
  logits, _ = model_lib.SparseTransformer(config).apply(
    {"params": params}, tokens
  )
  return jnp.mean(layerwise.next_token_losses(logits, tokens))


@functools.partial(jax.jit, static_argnums=(0,))
def _answers_right(
  config, params, tokens, places, is_answer, runtime_schedule
) -> Bool[Array, " B"]:
  """Whether the tokens at the places that count are all the likeliest."""
  logits, _ = model_lib.SparseTransformer(config).apply(
    {"params": params}, tokens, runtime_schedule=runtime_schedule
  )
  guesses = jnp.argmax(logits[:, places - 1], axis=-1)
  return jnp.all((guesses == tokens[:, places]) | ~is_answer, axis=-1)
