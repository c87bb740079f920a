# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training in the published order: dense, indexer warm-up, sparse.

DeepSeek-V3.2 technical report, section 2.1, and IndexCache (arXiv 2603.12201),
section 3.3: the model first learns with dense attention; then its indexers
alone learn to predict that attention (KL over all visible keys); then all of
it learns under sparse attention, the indexers from the KL over the selected
keys, everything else from the language-model loss. No gradient crosses.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int32

from indexcache_jax import config as config_lib
from indexcache_jax import distillation, layerwise, needles
from indexcache_jax import model as model_lib
from indexcache_jax import text as text_lib

Stage = Literal["dense", "warmup", "sparse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long, how fast and on what a model trains.

  Attributes:
    context: tokens of a sequence.
    batch_size: sequences of a step.
    dense_steps: steps of the language model under dense attention.
    warmup_steps: steps of the indexers alone.
    sparse_steps: steps under sparse attention.
    learning_rate: peak of the dense stage, reached after `ramp_steps`; a
      cosine takes it down to a tenth, where the sparse stage continues and
      decays to zero.
    indexer_learning_rate: of the indexers in the warm-up; a tenth of it in
      the sparse stage.
    ramp_steps: steps over which either rate rises from zero.
    weight_decay: of AdamW, on matrices only.
    clip_norm: largest norm of the indexers' gradient, and of all else's.
    multi_layer: whether a full layer learns from all the layers that it
      serves; it matters under a schedule with shared layers.
    needle_fraction: share of sequences with hidden facts, see `needles`.
    num_needles: facts in such a sequence.
    seed: of initial weights and data.
  """

  context: int
  batch_size: int
  dense_steps: int
  warmup_steps: int
  sparse_steps: int
  learning_rate: float = 2e-3
  indexer_learning_rate: float = 5e-3
  ramp_steps: int = 100
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  multi_layer: bool = True
  needle_fraction: float = 0.0
  num_needles: int = 4
  seed: int = 0

  def __post_init__(self):
    for field in ("context", "batch_size", "num_needles", "ramp_steps"):
      if getattr(self, field) < 1:
        raise ValueError(
          f"`{field}` must be at least 1: got {getattr(self, field)}."
        )
    for field in ("dense_steps", "warmup_steps", "sparse_steps"):
      if getattr(self, field) < 0:
        raise ValueError(
          f"`{field}` must not be negative: got {getattr(self, field)}."
        )
    if not 0 <= self.needle_fraction <= 1:
      raise ValueError(
        f"`needle_fraction` must lie in [0, 1]: got {self.needle_fraction}."
      )

  @property
  def num_steps(self) -> int:
    """Steps of all three stages."""
    return self.dense_steps + self.warmup_steps + self.sparse_steps

  def stage(self, step: int) -> Stage:
    """The stage that a step belongs to."""
    if step < self.dense_steps:
      return "dense"
    if step < self.dense_steps + self.warmup_steps:
      return "warmup"
    return "sparse"


@flax.struct.dataclass
class TrainState:
  """All that a resumed run needs: data follows from the step."""

  step: Int32[Array, ""]
  params: dict
  opt_state: optax.OptState


class Metrics(NamedTuple):
  """Of one step.

  Attributes:
    loss: mean next-token loss, in nats.
    index_kl: mean KL of the served layers' attention from their indexer, a
      full layer; 0 in the dense stage.
    grad_norm: before clipping.
  """

  loss: Float32[Array, ""]
  index_kl: Float32[Array, ""]
  grad_norm: Float32[Array, ""]


def init_state(
  config: config_lib.SparseTransformerConfig, train: TrainConfig
) -> TrainState:
  """Returns fresh parameters and optimiser state."""
  tokens = jnp.zeros((1, config.index_topk + 1), jnp.int32)
  init = jax.jit(model_lib.SparseTransformer(config).init)
  params = init(jax.random.key(train.seed), tokens)["params"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=make_optimizer(train).init(params),
  )


def make_optimizer(train: TrainConfig) -> optax.GradientTransformation:
  """AdamW with one learning rate for indexers and one for all else.

  A rate of zero freezes its part exactly, weight decay included.
  """
  main, indexer = learning_rates(train)

  # Clipped apart: one part's large gradient must not slow the other.
  def adamw(rate):
    return optax.chain(
      optax.clip_by_global_norm(train.clip_norm),
      optax.adamw(
        rate, b2=0.95, weight_decay=train.weight_decay, mask=_is_matrix
      ),
    )

  return optax.multi_transform(
    {"main": adamw(main), "indexer": adamw(indexer)}, _labels
  )


def learning_rates(
  train: TrainConfig,
) -> tuple[optax.Schedule, optax.Schedule]:
  """Rates of (everything else, indexers) by step; zero where frozen."""
  floor = 0.1

  def main(step):
    ramp = jnp.minimum(1.0, (step + 1) / train.ramp_steps)
    progress = jnp.clip(step / max(train.dense_steps, 1), 0, 1)
    dense = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    sparse = floor * _remaining(train, step)
    in_warmup = (step >= train.dense_steps) & (step < _sparse_start(train))
    rate = jnp.where(step < train.dense_steps, ramp * dense, sparse)
    return train.learning_rate * jnp.where(in_warmup, 0.0, rate)

  def indexer(step):
    since = step - train.dense_steps
    warmup = jnp.minimum(1.0, (since + 1) / train.ramp_steps)
    sparse = floor * _remaining(train, step)
    rate = jnp.where(step < _sparse_start(train), warmup, sparse)
    return train.indexer_learning_rate * jnp.where(since < 0, 0.0, rate)

  return main, indexer


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3,))
def train_step(
  config: config_lib.SparseTransformerConfig,
  train: TrainConfig,
  stage: Stage,
  state: TrainState,
  tokens: Int32[Array, "B T"],
) -> tuple[TrainState, Metrics]:
  """Takes one step of `stage`; the state is donated."""
  model = model_lib.SparseTransformer(config)

  def total_loss(params):
    logits, aux = model.apply(
      {"params": params},
      tokens,
      attention_kind="sparse" if stage == "sparse" else "dense",
    )
    loss = jnp.mean(layerwise.next_token_losses(logits, tokens))
    index_kl = jnp.zeros((), jnp.float32)
    if stage != "dense":
      index_kl = distillation.distillation_loss(
        aux, config, multi_layer=train.multi_layer
      )
    # In the warm-up the rest is frozen, so its gradient is not computed.
    total = index_kl if stage == "warmup" else loss + index_kl
    return total, (loss, index_kl / config.schedule.num_full)

  grads, (loss, index_kl) = jax.grad(total_loss, has_aux=True)(state.params)
  updates, opt_state = make_optimizer(train).update(
    grads, state.opt_state, state.params
  )
  state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
  )
  return state, Metrics(loss, index_kl, optax.tree.norm(grads))


def training_batch(
  tokens: Int32[np.ndarray, " tokens"], train: TrainConfig, step: int
) -> Int32[np.ndarray, "B T"]:
  """Returns the batch of a step: a function of the seed and the step alone."""
  rng = np.random.default_rng((train.seed, step))
  windows = text_lib.random_windows(
    tokens, rng, train.batch_size, train.context
  )
  num_needles = round(train.needle_fraction * train.batch_size)
  for row in range(num_needles):
    windows[row] = needles.hide_needles(windows[row], rng, train.num_needles)
  return windows


def check_finite(step: int, metrics: Metrics, state: TrainState) -> None:
  """Raises FloatingPointError that names the step and the bad tensors."""
  if all(np.isfinite(float(value)) for value in metrics):
    return
  bad = [
    "/".join(path)
    for path, value in flax.traverse_util.flatten_dict(state.params).items()
    if not bool(jnp.all(jnp.isfinite(value)))
  ]
  raise FloatingPointError(
    f"Training must stay finite: at step {step} got loss={metrics.loss},"
    f" index_kl={metrics.index_kl}, grad_norm={metrics.grad_norm}; parameters"
    f" that are not finite after the step: {', '.join(bad) or 'none'}. Lower"
    " the learning rate, or resume from the last saved step with another seed."
  )


def is_indexer(path: tuple[str, ...]) -> bool:
  """Whether a parameter's path lies in an indexer."""
  return "indexer" in path


def _labels(params):
  return flax.traverse_util.path_aware_map(
    lambda path, _: "indexer" if is_indexer(path) else "main", params
  )


def _is_matrix(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


def _sparse_start(train):
  return train.dense_steps + train.warmup_steps


def _remaining(train, step):
  """Share of the sparse stage still to come."""
  done = (step - _sparse_start(train)) / max(train.sparse_steps, 1)
  return 1 - jnp.clip(done, 0, 1)
