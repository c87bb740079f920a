# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training in the published order: dense, indexer warm-up, sparse.

DeepSeek-V3.2 technical report, section 2.1, and IndexCache (arXiv 2603.12201),
section 3.3: the model first learns with dense attention; then its indexers
alone learn to predict that attention (KL over all visible keys); then all of
it learns under sparse attention, the indexers from the KL over the selected
keys, everything else from the language-model loss. No gradient crosses.

Mixed precision: parameters, gradients' sums and the optimiser are float32
(`config.param_dtype`), activations and matrix products `config.dtype`.
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
from indexcache_jax import distillation, layerwise, long_context_tasks
from indexcache_jax import model as model_lib
from indexcache_jax import text as text_lib

Stage = Literal["dense", "warmup", "sparse"]
Trained = Literal["all", "indexers", "rest"]

# Named in an error; a NaN in the residual stream spoils all of them.
_MOST_NAMES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long, how fast and on what a model trains.

  Attributes:
    context: tokens of a sequence.
    batch_size: sequences of a step.
    accumulation: parts that a step's sequences are run in, one after another;
      memory is that of one part.
    short_context: tokens of a sequence in the first `short_steps` steps, which
      hold as many tokens in all; None: `context`.
    short_steps: of the dense stage, on short sequences.
    warmup_batch_size: sequences of a warm-up step; None: `batch_size`. The
      loss over all keys costs several times a step of the other stages, and
      the indexers need many steps rather than large ones.
    dense_steps: steps of the language model under dense attention.
    warmup_steps: steps of the indexers alone.
    sparse_steps: steps under sparse attention.
    sparse_trains: what learns in the sparse stage: "all", the "indexers"
      alone, or the "rest" under frozen indexers, without their loss.
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
    mixture: kinds of sequences and their shares, see `long_context_tasks`.
    density: share of a task's sequence that facts and questions take.
    seed: of initial weights and data.
  """

  context: int
  batch_size: int
  dense_steps: int
  warmup_steps: int
  sparse_steps: int
  accumulation: int = 1
  short_context: int | None = None
  short_steps: int = 0
  warmup_batch_size: int | None = None
  sparse_trains: Trained = "all"
  learning_rate: float = 2e-3
  indexer_learning_rate: float = 5e-3
  ramp_steps: int = 100
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  multi_layer: bool = True
  mixture: tuple[tuple[str, float], ...] = ((long_context_tasks.TEXT, 1.0),)
  density: float = 0.25
  seed: int = 0

  def __post_init__(self):
    for field in ("context", "batch_size", "accumulation", "ramp_steps"):
      if getattr(self, field) < 1:
        raise ValueError(
          f"`{field}` must be at least 1: got {getattr(self, field)}."
        )
    for field in ("dense_steps", "warmup_steps", "sparse_steps", "short_steps"):
      if getattr(self, field) < 0:
        raise ValueError(
          f"`{field}` must not be negative: got {getattr(self, field)}."
        )
    if not 0 < self.density <= 1:
      raise ValueError(
        f"`density` must lie above 0 and at most at 1: got {self.density}."
      )
    long_context_tasks.check_mixture(self.mixture)
    self._check_parts()

  def _check_parts(self):
    if self.short_context is not None and self.context % self.short_context:
      raise ValueError(
        "`short_context` must divide `context`, so that steps hold as many"
        f" tokens: got short_context={self.short_context} for"
        f" context={self.context}."
      )
    if self.short_steps > self.dense_steps:
      raise ValueError(
        "`short_steps` are the first ones of the dense stage: got"
        f" short_steps={self.short_steps} for dense_steps={self.dense_steps}."
      )
    for field in ("batch_size", "warmup_batch_size"):
      size = getattr(self, field)
      if size is not None and (size < 1 or size % self.accumulation):
        raise ValueError(
          f"`accumulation` must divide `{field}`: got"
          f" accumulation={self.accumulation} for {field}={size}."
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

  def batch_shape(self, step: int) -> tuple[int, int]:
    """Sequences of a step and their tokens."""
    if self.stage(step) == "warmup" and self.warmup_batch_size is not None:
      return self.warmup_batch_size, self.context
    if self.short_context is None or step >= self.short_steps:
      return self.batch_size, self.context
    parts = self.context // self.short_context
    return self.batch_size * parts, self.short_context


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
      full layer; 0 where nothing learns from it.
    grad_norm: before clipping.
    is_finite: of each parameter's gradient, in the parameters' structure.
  """

  loss: Float32[Array, ""]
  index_kl: Float32[Array, ""]
  grad_norm: Float32[Array, ""]
  is_finite: dict


def init_state(
  config: config_lib.SparseTransformerConfig,
  train: TrainConfig,
  params: dict | None = None,
) -> TrainState:
  """Returns fresh optimiser state, and parameters: fresh ones, or those given.

  Args:
    config: of the model.
    train: its seed draws fresh parameters.
    params: to begin with, copied, in `config.param_dtype`.
  """
  if params is None:
    # Op by op, through XLA's lowering, which changes no parameter: the ops of
    # all layers are the same ones, where a whole program of 16 layers with its
    # hundreds of random arrays compiles for two minutes.
    model = model_lib.SparseTransformer(config.replace(implementation="xla"))
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = model.init(jax.random.key(train.seed), tokens)["params"]
  else:
    params = jax.tree.map(
      lambda x: jnp.array(x, config.param_dtype, copy=True), params
    )
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
    if train.sparse_trains == "indexers":
      sparse = 0.0
    rate = jnp.where(step < train.dense_steps, ramp * dense, sparse)
    return train.learning_rate * jnp.where(in_warmup, 0.0, rate)

  def indexer(step):
    since = step - train.dense_steps
    warmup = jnp.minimum(1.0, (since + 1) / train.ramp_steps)
    sparse = floor * _remaining(train, step)
    if train.sparse_trains == "rest":
      sparse = 0.0
    rate = jnp.where(step < _sparse_start(train), warmup, sparse)
    return train.indexer_learning_rate * jnp.where(since < 0, 0.0, rate)

  return main, indexer


@functools.partial(
  jax.jit,
  static_argnums=(0, 1, 2),
  static_argnames=("mesh",),
  donate_argnums=(3,),
)
def train_step(
  config: config_lib.SparseTransformerConfig,
  train: TrainConfig,
  stage: Stage,
  state: TrainState,
  tokens: Int32[Array, "B T"],
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, Metrics]:
  """Takes one step of `stage`; the state is donated.

  Args:
    config: of the model.
    train: settings.
    stage: of this step.
    state: before it, on every device.
    tokens: of a whole step.
    mesh: with one axis, "data", over whose devices the sequences are split;
      None: one device.
  """
  gradients = functools.partial(_mean_gradients, config, train, stage)
  if mesh is not None:
    gradients = _over_devices(gradients, mesh)
  grads, losses = gradients(state.params, tokens)
  updates, opt_state = make_optimizer(train).update(
    grads, state.opt_state, state.params
  )
  state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
  )
  squares = jax.tree.map(lambda x: jnp.sum(jnp.square(x)), grads)
  return state, Metrics(
    loss=losses[0],
    index_kl=losses[1] / config.schedule.num_full,
    grad_norm=jnp.sqrt(sum(jax.tree.leaves(squares))),
    is_finite=jax.tree.map(jnp.isfinite, squares),
  )


def _over_devices(gradients, mesh):
  """Means over devices, each with sequences of its own."""

  def mean(params, tokens):
    return jax.lax.pmean(gradients(params, tokens), "data")

  spec = jax.sharding.PartitionSpec
  return jax.shard_map(
    mean,
    mesh=mesh,
    in_specs=(spec(), spec("data")),
    out_specs=spec(),
    # Kernels do not say on which axes their results vary.
    check_vma=False,
  )


def _mean_gradients(config, train, stage, params, tokens):
  """Gradients and both losses, means over the parts of a step."""
  part_gradients = jax.grad(
    functools.partial(_total_loss, config, train, stage), has_aux=True
  )
  if train.accumulation == 1:
    return part_gradients(params, tokens)
  parts = tokens.reshape(train.accumulation, -1, tokens.shape[1])

  def add(total, part):
    return jax.tree.map(jnp.add, total, part_gradients(params, part)), None

  shapes = jax.eval_shape(part_gradients, params, parts[0])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda x: x / train.accumulation, total)


def _total_loss(config, train, stage, params, tokens):
  """What a stage minimises, and (language-model loss, distillation loss)."""
  logits, aux = model_lib.SparseTransformer(config).apply(
    {"params": params},
    tokens,
    attention_kind="sparse" if stage == "sparse" else "dense",
  )
  loss = jnp.mean(layerwise.next_token_losses(logits, tokens))
  trained = {"dense": "rest", "warmup": "indexers"}.get(
    stage, train.sparse_trains
  )
  # What is frozen has no term, so its gradient is not computed.
  index_kl, total = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
  if trained != "rest":
    index_kl = distillation.distillation_loss(
      aux, config, multi_layer=train.multi_layer
    )
    total += index_kl
  if trained != "indexers":
    total += loss
  return total, (loss, index_kl)


def training_batch(
  tokens: Int32[np.ndarray, " tokens"], train: TrainConfig, step: int
) -> Int32[np.ndarray, "B T"]:
  """Returns the batch of a step: a function of the seed and the step alone."""
  rng = np.random.default_rng((train.seed, step))
  windows = text_lib.random_windows(tokens, rng, *train.batch_shape(step))
  return np.stack(
    [
      long_context_tasks.mixed_window(window, rng, train.mixture, train.density)
      for window in windows
    ]
  )


def check_finite(step: int, metrics: Metrics) -> None:
  """Raises FloatingPointError that names the step and the bad tensors.

  Their values after the step are as bad: do not save them.
  """
  losses = metrics.loss, metrics.index_kl, metrics.grad_norm
  if all(np.isfinite(float(value)) for value in losses):
    return
  bad = [
    "/".join(path)
    for path, value in sorted(
      flax.traverse_util.flatten_dict(metrics.is_finite).items()
    )
    if not bool(value)
  ]
  names = ", ".join(bad[:_MOST_NAMES]) or "none"
  if len(bad) > _MOST_NAMES:
    names += f" and {len(bad) - _MOST_NAMES} more"
  raise FloatingPointError(
    f"Training must stay finite: at step {step} got loss={metrics.loss},"
    f" index_kl={metrics.index_kl}, grad_norm={metrics.grad_norm}; parameters"
    f" whose gradient is not finite: {names}. Lower the learning rate, or"
    " resume from the last saved step with another seed."
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
