# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains all models of the paper's experiment, for one seed.

A base model (dense, warm-up, sparse; all full), a greedy search on it, and from
it the variants of table 3: each goes on for as long, under its schedule, with
its loss. Whatever is finished is left as it is, so repeat the command until it
prints "All trained.":

  python -m experiments.paper_runs --dtype=bfloat16 --seed=0 --max_minutes=8 \
    --output_dir=runs/paper/seed0

Expected: `base/` and a folder a variant, each as `experiments.train` writes it,
and `search.json`. `experiments.paper_tables` measures them.
"""

import json
import math
import pathlib
import time

import jax.numpy as jnp
from absl import flags, logging

import indexcache_jax as ic
from experiments import (
  common,
  inputs,
  paper_measurements,
  paper_recipe,
  training_loop,
)

_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/paper/seed0", "Of this seed's runs."
)
_VARIANTS = flags.DEFINE_multi_enum(
  "variant",
  list(paper_recipe.VARIANTS),
  list(paper_recipe.VARIANTS),
  "To train after the base model.",
)
_SCALE = flags.DEFINE_float(
  "scale", 1.0, "Factor on the steps of all stages; 1: 104 million tokens."
)
_MAX_MINUTES = flags.DEFINE_float(
  "max_minutes",
  math.inf,
  "After these the state is saved and the script ends; the same command goes"
  " on.",
)
_MAX_TEXT_TOKENS = flags.DEFINE_integer(
  "max_text_tokens", 1 << 26, "Read at most, of four bytes each."
)
_SAVE_EVERY = 200


def main(argv):
  """Trains what is missing."""
  deadline = training_loop.deadline_after(_MAX_MINUTES.value)
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  recipe = paper_recipe.recipe(
    inputs.SEED.value,
    dtype=jnp.dtype(inputs.DTYPE.value),
    smoke=inputs.SMOKE.value,
    scale=_SCALE.value,
  )
  folder = pathlib.Path(_OUTPUT_DIR.value).absolute()
  tokens, _ = inputs.split_bytes(_MAX_TEXT_TOKENS.value)
  print(
    f"{common.count_parameters(recipe.config):,} parameters,"
    f" {len(tokens):,} tokens"
  )
  kwargs = {"save_every": _SAVE_EVERY, "deadline": deadline}
  if training_loop.train_to_checkpoint(
    recipe.config, recipe.base, tokens, folder / "base", **kwargs
  ) and _train_variants(recipe, tokens, folder, **kwargs):
    print("All trained.")


def _train_variants(recipe, tokens, folder, *, deadline, save_every):
  """Returns whether all are finished."""
  base = folder / "base" / "checkpoint"
  for name in _VARIANTS.value:
    if time.monotonic() > deadline:
      print("The time is up: the same command goes on.")
      return False
    schedule = _schedule(recipe, folder, paper_recipe.VARIANTS[name])
    _, params = ic.load_checkpoint(
      base, jnp.float32, schedule=schedule, progress=False
    )
    print(f"{name}: {schedule.pattern}")
    if not training_loop.train_to_checkpoint(
      recipe.config.replace(schedule=schedule),
      recipe.variant_training(name),
      tokens,
      folder / paper_recipe.folder_name(name),
      params=params,
      origin="base",
      deadline=deadline,
      save_every=save_every,
    ):
      return False
  return True


def _schedule(recipe, folder, variant):
  num_layers = recipe.config.num_hidden_layers
  if variant.rule == "searched":
    return ic.ReuseSchedule(_search(recipe, folder)[str(variant.retention)])
  return ic.ReuseSchedule.uniform(
    num_layers, every=variant.retention.denominator
  )


def _search(recipe, folder):
  """Patterns by retention, from `search.json` or a search that writes it."""
  path = folder / "search.json"
  if not path.exists():
    model = paper_measurements.Model.load(
      recipe, folder / "base" / "checkpoint"
    )
    searches = paper_measurements.search_all(model)
    common.write_text(path, json.dumps(searches, indent=1) + "\n")
  return json.loads(path.read_text())[paper_measurements.CALIBRATION][
    "patterns"
  ]


if __name__ == "__main__":
  common.run(main)
