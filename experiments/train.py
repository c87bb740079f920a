# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains a byte-level DSA language model on text and long-context tasks.

Claim: in the published order (dense attention; indexers alone on KL; sparse
attention) a model of a few million parameters learns to find, under sparse
attention, facts that lie many times `index_topk` away.

  python -m experiments.train --dtype=bfloat16 --output_dir=runs/small

Expected: a folder with `checkpoint/` (Hugging Face format, read by
`indexcache_jax.load_checkpoint`), `state/` (orbax; the same command resumes
from it), `log.jsonl` (a line a step) and `tensorboard/`.
`results/embedded_model/README.md` holds the command, device, run time and
losses of the embedded model. On a machine with time limits add
--max_minutes=8 and repeat the command until it prints "Checkpoint:". With
--checkpoint it goes on from another model, for example under shared layers:

  python -m experiments.train --checkpoint=runs/small/checkpoint \
    --schedule=uniform:2 --dense_steps=0 --output_dir=runs/uniform_2
"""

import math
import pathlib

import jax.numpy as jnp
from absl import flags, logging

import indexcache_jax as ic
from experiments import common, inputs, training_loop
from indexcache_jax import long_context_tasks, training

_PRESET = flags.DEFINE_enum(
  "preset",
  "small",
  sorted(ic.PRESETS),
  "Dimensions of the model, unless --checkpoint has them.",
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/train", "Where checkpoint, state and logs go."
)
_SCHEDULE = flags.DEFINE_string(
  "schedule",
  "full",
  "To train under: a pattern such as FSSF, full, uniform:4, freq:4, freq:4:3.",
)
_MULTI_LAYER = flags.DEFINE_bool(
  "multi_layer", True, "Distil every served layer into its full layer."
)
_SPARSE_TRAINS = flags.DEFINE_enum(
  "sparse_trains",
  "all",
  ["all", "indexers", "rest"],
  "What learns in stage 2; the others are frozen.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Sequences of a step.")
_ACCUMULATION = flags.DEFINE_integer(
  "accumulation", 1, "Parts of a step, one after another; saves memory."
)
_SHORT_CONTEXT = flags.DEFINE_integer(
  "short_context", None, "Tokens of a sequence in the first --short_steps."
)
_SHORT_STEPS = flags.DEFINE_integer(
  "short_steps", 0, "Steps of stage 0 on short sequences."
)
_WARMUP_BATCH_SIZE = flags.DEFINE_integer(
  "warmup_batch_size",
  None,
  "Sequences of a warm-up step; default: --batch_size.",
  lower_bound=1,
)
_DENSE_STEPS = flags.DEFINE_integer("dense_steps", 2000, "Stage 0.")
_WARMUP_STEPS = flags.DEFINE_integer("warmup_steps", 150, "Stage 1.")
_SPARSE_STEPS = flags.DEFINE_integer("sparse_steps", 250, "Stage 2.")
_RAMP_STEPS = flags.DEFINE_integer(
  "ramp_steps", 100, "In which a learning rate rises."
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "Its peak.")
_INDEXER_LEARNING_RATE = flags.DEFINE_float(
  "indexer_learning_rate", 5e-3, "Of the warm-up."
)
_MIXTURE = flags.DEFINE_list(
  "mixture",
  ["text:3", "needle:1"],
  f"Kinds of sequences, text or {', '.join(long_context_tasks.TASKS)}, and"
  " their shares.",
)
_DENSITY = flags.DEFINE_float(
  "density", 0.25, "Share of a task's sequence that facts and questions take."
)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 200, "Steps between saves.")
_MAX_MINUTES = flags.DEFINE_float(
  "max_minutes",
  math.inf,
  "After these the state is saved and the script ends; the same command goes"
  " on.",
)
_MAX_TEXT_TOKENS = flags.DEFINE_integer(
  "max_text_tokens", 1 << 26, "Read at most, of four bytes each."
)


def main(argv):
  """Trains, saves, and prints where the checkpoint is."""
  deadline = training_loop.deadline_after(_MAX_MINUTES.value)
  common.reject_arguments(argv)
  # orbax tells every save in twenty lines; the progress bar says enough.
  logging.set_verbosity(logging.WARNING)
  config, train = _configs()
  tokens, _ = inputs.split_bytes(_MAX_TEXT_TOKENS.value)
  print(
    f"{len(tokens):,} tokens, {common.count_parameters(config):,} parameters"
  )
  output_dir = pathlib.Path(_OUTPUT_DIR.value).absolute()
  training_loop.train_to_checkpoint(
    config,
    train,
    tokens,
    output_dir,
    params=_initial_params(config),
    origin=inputs.CHECKPOINT.value,
    save_every=_SAVE_EVERY.value,
    deadline=deadline,
  )


def _configs():
  """Of the preset and the flags; a checkpoint's is put in later."""
  config = ic.PRESETS[_PRESET.value]()
  if inputs.CHECKPOINT.value:
    config = ic.load_config(inputs.CHECKPOINT.value)
  # The longest contexts that are published are no default for a first try.
  context = inputs.CONTEXT.value or min(config.max_position_embeddings, 8192)
  batch_size = _BATCH_SIZE.value
  steps = (_DENSE_STEPS.value, _WARMUP_STEPS.value, _SPARSE_STEPS.value)
  if inputs.SMOKE.value:
    if not inputs.CHECKPOINT.value:
      config = ic.PRESETS["tiny"]().replace(
        vocab_size=256, num_hidden_layers=2, first_k_dense_replace=2
      )
    context, batch_size, steps = 192, 2, (2, 2, 2)
  changes = {
    "dtype": jnp.dtype(inputs.DTYPE.value),
    "param_dtype": jnp.float32,
    "max_position_embeddings": max(context, config.max_position_embeddings),
    "schedule": ic.ReuseSchedule.parse(
      _SCHEDULE.value, config.num_hidden_layers
    ),
  }
  train = training.TrainConfig(
    context=context,
    batch_size=batch_size,
    accumulation=_ACCUMULATION.value,
    short_context=_SHORT_CONTEXT.value,
    short_steps=_SHORT_STEPS.value,
    warmup_batch_size=_WARMUP_BATCH_SIZE.value,
    dense_steps=steps[0],
    warmup_steps=steps[1],
    sparse_steps=steps[2],
    sparse_trains=_SPARSE_TRAINS.value,
    ramp_steps=_RAMP_STEPS.value,
    learning_rate=_LEARNING_RATE.value,
    indexer_learning_rate=_INDEXER_LEARNING_RATE.value,
    multi_layer=_MULTI_LAYER.value,
    mixture=long_context_tasks.parse_mixture(_MIXTURE.value),
    density=_DENSITY.value,
    seed=inputs.SEED.value,
  )
  return config.replace(**changes), train


def _initial_params(config):
  """Parameters of --checkpoint, or None for fresh ones."""
  if not inputs.CHECKPOINT.value:
    return None
  _, params = ic.load_checkpoint(
    inputs.CHECKPOINT.value, jnp.float32, schedule=config.schedule
  )
  return params


if __name__ == "__main__":
  common.run(main)
