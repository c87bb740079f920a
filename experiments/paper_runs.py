# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains all models of the paper's experiment, for one seed.

A base model (dense, warm-up, sparse; all full), a greedy search on it, and from
it the variants of table 3: each goes on for as long, under its schedule, with
its loss. Whatever is finished is left as it is, so repeat the command until it
prints "All done.":

  python -m experiments.paper_runs --dtype=bfloat16 --seed=0 --max_minutes=8 \
    --output_dir=runs/paper/seed0

Expected: `base/` and a folder a variant, each as `experiments.train` writes it,
and `search.json`. `experiments.paper_tables` measures them.

A program compiles for a minute and a variant trains for one or two. With
JAX_COMPILATION_CACHE_DIR set, processes of `--part=NAME --compile_only` prepare
the variants while the base model trains; then each variant can be a process of
its own on one device, and the search another.
"""

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
_BASE, _SEARCH = "base", "search"
_ALL_PARTS = (_BASE, _SEARCH, *paper_recipe.VARIANTS)
_PARTS = flags.DEFINE_multi_enum(
  "part",
  list(_ALL_PARTS),
  list(_ALL_PARTS),
  "To do, in this order; all need the base model, searched variants the"
  " search.",
)
_COMPILE_ONLY = flags.DEFINE_bool(
  "compile_only",
  False,
  "Only compile what trains the parts, into JAX's compilation cache.",
)
_SCALE = flags.DEFINE_float(
  "scale", 1.0, "Factor on the steps of all stages; 1: 255 million tokens."
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
  """Does the parts that are missing."""
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
  parts = [part for part in _ALL_PARTS if part in _PARTS.value]
  if _COMPILE_ONLY.value:
    _compile(recipe, folder, parts)
    return
  tokens, _ = inputs.split_bytes(_MAX_TEXT_TOKENS.value, recipe.packages)
  print(
    f"{common.count_parameters(recipe.config):,} parameters,"
    f" {len(tokens):,} tokens"
  )
  for part in parts:
    if time.monotonic() > deadline:
      print("The time is up: the same command goes on.")
      return
    if part == _SEARCH:
      _search(recipe, folder)
    elif not training_loop.train_to_checkpoint(
      *_run(recipe, folder, part),
      tokens,
      folder / paper_recipe.folder_name(part),
      save_every=_SAVE_EVERY,
      deadline=deadline,
      **_start(recipe, folder, part),
    ):
      return
  print("All done.")


def _compile(recipe, folder, parts):
  for part in parts:
    variant = paper_recipe.VARIANTS.get(part)
    is_searched = variant is not None and variant.rule == "searched"
    if part == _SEARCH or (is_searched and not _search_path(folder).exists()):
      print(f"{part}: nothing to compile before the search.")
      continue
    training_loop.compile_stages(*_run(recipe, folder, part))
    print(f"{part}: compiled.")


def _run(recipe, folder, part):
  """The model and the training of a part."""
  if part == _BASE:
    return recipe.config, recipe.base
  schedule = _schedule(recipe, folder, paper_recipe.VARIANTS[part])
  print(f"{part}: {schedule.pattern}")
  return (
    recipe.config.replace(schedule=schedule),
    recipe.variant_training(part),
  )


def _start(recipe, folder, part):
  """What a part begins with."""
  if part == _BASE:
    return {}
  schedule = _schedule(recipe, folder, paper_recipe.VARIANTS[part])
  _, params = ic.load_checkpoint(
    _base_path(folder), jnp.float32, schedule=schedule, progress=False
  )
  return {"params": params, "origin": _BASE}


def _base_path(folder):
  path = folder / _BASE / "checkpoint"
  if not path.exists():
    raise ValueError(
      "--part must name `base` until the base model is trained: got"
      f" {', '.join(_PARTS.value)} and no {path}. Train it with --part=base,"
      " to its end."
    )
  return path


def _search_path(folder):
  return folder / "search.json"


def _schedule(recipe, folder, variant):
  num_layers = recipe.config.num_hidden_layers
  if variant.rule == "searched":
    return ic.ReuseSchedule(_search(recipe, folder)[str(variant.retention)])
  return ic.ReuseSchedule.uniform(
    num_layers, every=variant.retention.denominator
  )


def _search(recipe, folder):
  """Patterns by retention, from `search.json` or a search that writes it."""
  searches = paper_measurements.searches(
    _search_path(folder),
    lambda: paper_measurements.Model.load(recipe, _base_path(folder)),
  )
  return searches[paper_measurements.CALIBRATION]["patterns"]


if __name__ == "__main__":
  common.run(main)
