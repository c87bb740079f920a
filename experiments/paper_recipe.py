# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the paper's experiment trains and measures, at full size and tiny."""

import dataclasses
import fractions

import jax.numpy as jnp

import indexcache_jax as ic
from indexcache_jax import training

RETENTIONS = tuple(fractions.Fraction(1, n) for n in (2, 4, 8))
FULL = "full"


@dataclasses.dataclass(frozen=True)
class Variant:
  """A model that goes on from the base model under a schedule.

  Attributes:
    rule: that chooses the schedule, "full", "uniform" or "searched".
    retention: share of the layers that stay full.
    multi_layer: the loss of its indexers.
  """

  rule: str
  retention: fractions.Fraction
  multi_layer: bool


_HALF, _QUARTER, _ = RETENTIONS
# In the order in which they are trained, the claims' first.
VARIANTS = {
  # The control: as long a training as all others have.
  FULL: Variant(FULL, fractions.Fraction(1), True),
  "uniform 1/4, multi-layer": Variant("uniform", _QUARTER, True),
  "uniform 1/4, own layer": Variant("uniform", _QUARTER, False),
  "searched 1/4, multi-layer": Variant("searched", _QUARTER, True),
  "uniform 1/2, multi-layer": Variant("uniform", _HALF, True),
  "uniform 1/2, own layer": Variant("uniform", _HALF, False),
  "searched 1/2, multi-layer": Variant("searched", _HALF, True),
}


def folder_name(variant: str) -> str:
  """Of a variant's run: its name in letters, digits and underscores."""
  words = "".join(x if x.isalnum() else " " for x in variant)
  return "_".join(words.split())


def schedule_name(rule: str, retention: fractions.Fraction) -> str:
  """What tables call a schedule."""
  return FULL if retention == 1 else f"{rule} {retention}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """All sizes of the experiment.

  Attributes:
    config: of the model, all full.
    packages: whose source is read beside the standard library's, which is too
      little text: a model of this size learns 9 MB by heart.
    base: training of the base model.
    variant: training of each variant, from the base model.
    lengths: of the tasks' sequences.
    depths: of the asked facts.
    facts: asked of a task at a length.
    calibration_windows: that a search sees.
    held_out_windows: that losses are of.
    batch_size: sequences at a time, in measurements.
    overlap_positions: at which the selections are compared.
    timed_calls: of each schedule's prefill.
  """

  config: ic.SparseTransformerConfig
  packages: tuple[str, ...]
  base: training.TrainConfig
  variant: training.TrainConfig
  lengths: tuple[int, ...]
  depths: tuple[float, ...]
  facts: int
  calibration_windows: int
  held_out_windows: int
  batch_size: int
  overlap_positions: int
  timed_calls: int

  @property
  def context(self) -> int:
    """Tokens of a sequence of text."""
    return self.base.context

  def variant_training(self, name: str) -> training.TrainConfig:
    """Of a variant, by its name."""
    return dataclasses.replace(
      self.variant, multi_layer=VARIANTS[name].multi_layer
    )


_MIXTURE = (
  ("text", 4.0),
  ("needle", 2.0),
  ("variables", 1.0),
  ("copying", 1.0),
)


def recipe(
  seed: int, *, dtype: jnp.dtype, smoke: bool = False, scale: float = 1.0
) -> Recipe:
  """Returns the experiment of a seed, or one of seconds.

  Args:
    seed: of parameters and data.
    dtype: of activations.
    smoke: the one of seconds.
    scale: factor on the steps of all stages.

  Raises:
    ValueError: a scale that is not above 0.
  """
  if not 0 < scale < float("inf"):
    raise ValueError(f"`scale` must be finite and above 0: got {scale}.")
  sizes = _smoke(seed, dtype) if smoke else _whole(seed, dtype)
  return dataclasses.replace(
    sizes,
    base=_scaled(sizes.base, scale),
    variant=_scaled(sizes.variant, scale),
  )


def _scaled(train, scale):
  names = ("short_steps", "dense_steps", "warmup_steps", "sparse_steps")
  return dataclasses.replace(
    train, **{name: round(scale * getattr(train, name)) for name in names}
  )


def _whole(seed, dtype):
  base = training.TrainConfig(
    context=8192,
    batch_size=8,
    accumulation=2,
    short_context=1024,
    short_steps=2000,
    dense_steps=3200,
    warmup_steps=160,
    warmup_batch_size=2,
    sparse_steps=120,
    ramp_steps=40,
    learning_rate=1e-3,
    indexer_learning_rate=3e-3,
    mixture=_MIXTURE,
    density=0.3,
    seed=seed,
  )
  return Recipe(
    config=ic.PRESETS["paper"]().replace(dtype=dtype, param_dtype=jnp.float32),
    # This project requires them, or JAX does: every machine has them.
    packages=("flax", "jax", "matplotlib", "numpy", "optax", "scipy"),
    base=base,
    variant=dataclasses.replace(
      base, short_steps=0, dense_steps=0, warmup_steps=60, sparse_steps=60
    ),
    lengths=(2048, 4096, 8192),
    depths=(0.0, 0.25, 0.5, 0.75, 1.0),
    facts=40,
    calibration_windows=8,
    held_out_windows=16,
    batch_size=4,
    overlap_positions=64,
    timed_calls=10,
  )


def _smoke(seed, dtype):
  config = ic.PRESETS["tiny"]().replace(
    vocab_size=256,
    num_hidden_layers=2,
    first_k_dense_replace=2,
    dtype=dtype,
  )
  base = training.TrainConfig(
    context=192,
    batch_size=2,
    dense_steps=1,
    warmup_steps=0,
    sparse_steps=1,
    ramp_steps=1,
    mixture=(("text", 1.0), ("needle", 1.0)),
    seed=seed,
  )
  return Recipe(
    config=config,
    packages=(),
    base=base,
    variant=dataclasses.replace(base, dense_steps=0),
    lengths=(512, 640),
    depths=(0.0, 1.0),
    facts=2,
    calibration_windows=2,
    held_out_windows=2,
    batch_size=2,
    overlap_positions=4,
    timed_calls=1,
  )
