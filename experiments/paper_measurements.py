# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the paper's tables are made of, measured on the models of one seed."""

import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

import indexcache_jax as ic
from experiments import common, inputs, paper_recipe, provenance
from indexcache_jax import (
  analysis,
  comparison,
  costs,
  dynamic_programming,
  evaluation,
  long_context_tasks,
  methods,
  op_times,
  text,
)

# Names of calibration sets: what the models learned from, another draw of it,
# and text alone.
CALIBRATION = "mixture"
CALIBRATION_SETS = (CALIBRATION, "mixture, drawn again", "text")
# One sequence a batch of the losses' batches, see `LayerwiseLoss`.
_SEARCHED_BATCH = 4


@dataclasses.dataclass(frozen=True)
class Model:
  """A model with an indexer in every layer, and text for it.

  Attributes:
    recipe: of the experiment.
    params: of `recipe.config`.
    calibration: bytes that it trained on.
    held_out: bytes that it did not.
  """

  recipe: paper_recipe.Recipe
  params: dict[str, Any]
  calibration: Int32[np.ndarray, " tokens"]
  held_out: Int32[np.ndarray, " tokens"]

  @classmethod
  def load(cls, recipe: paper_recipe.Recipe, path: pathlib.Path) -> "Model":
    """Loads a checkpoint of the all-full model, and --text."""
    _, params = ic.load_checkpoint(path, recipe.config.dtype, progress=False)
    calibration, held_out = inputs.split_bytes(packages=recipe.packages)
    return cls(recipe, params, calibration, held_out)

  def with_variant(self, path: pathlib.Path) -> "Model":
    """A variant's checkpoint; its shared layers keep unused indexers.

    So the all-full program under a run-time schedule serves every variant: a
    compilation takes longer than a measurement.
    """
    _, params = ic.load_checkpoint(
      path, self.recipe.config.dtype, progress=False
    )
    return dataclasses.replace(self, params=_merge(self.params, params))

  @functools.cached_property
  def held_out_batches(self) -> Int32[np.ndarray, "M B T"]:
    """Windows of text for losses."""
    recipe = self.recipe
    return _in_batches(
      text.spread_windows(
        self.held_out, recipe.held_out_windows, recipe.context
      ),
      recipe.batch_size,
    )

  @functools.cached_property
  def task_batches(self):
    """Facts to ask for, by task and length; the same for every seed."""
    recipe = self.recipe
    return evaluation.task_batches(
      tuple(long_context_tasks.TASKS.values()),
      self.held_out,
      lengths=recipe.lengths,
      depths=recipe.depths,
      count=recipe.facts,
      seed=0,
    )


def searches(
  path: pathlib.Path, load_model: Callable[[], Model]
) -> dict[str, dict[str, Any]]:
  """Searches on each calibration set, unless `path` has them.

  Args:
    path: of the JSON file, which is written with its provenance.
    load_model: the base model, asked for where there is no file.

  Returns:
    By set: `patterns` by retention, such as "1/4", and `trace`, the flipped
    layers with their losses.
  """
  if not path.exists():
    model = load_model()
    record = {
      **source(),
      "searches": {name: _search(model, name) for name in CALIBRATION_SETS},
    }
    common.write_text(path, json.dumps(record, indent=1) + "\n")
  found = json.loads(path.read_text(encoding="utf-8"))
  if "searches" not in found:
    raise ValueError(
      f"{path} must hold `searches` with their provenance: got"
      f" {', '.join(found)}. It is of an older version: remove it, and the"
      " search is done again."
    )
  return found["searches"]


def source() -> dict[str, Any]:
  """The command that measures, and where it runs."""
  return {"command": provenance.command(), "environment": common.environment()}


def _search(model, calibration_set):
  recipe = model.recipe
  loss_fn = ic.LayerwiseLoss(
    recipe.config, model.params, calibration_batches(model, calibration_set)
  )
  num_layers = recipe.config.num_hidden_layers
  wanted = {
    str(retention): comparison.num_full_layers(retention, num_layers)
    for retention in paper_recipe.RETENTIONS
  }
  results = methods.greedy(
    methods.SearchProblem(loss_fn=loss_fn, num_layers=num_layers),
    sorted(set(wanted.values())),
  )
  fewest = results[min(wanted.values())]
  print(f"Searched on {calibration_set!r}: {fewest.schedule.pattern}")
  return {
    "patterns": {
      retention: results[count].schedule.pattern
      for retention, count in wanted.items()
    },
    "trace": [
      {"layer": step.layer, "loss": step.loss, "pattern": step.pattern}
      for step in fewest.search.trace
    ],
  }


def calibration_batches(
  model: Model, calibration_set: str
) -> Int32[np.ndarray, "M B T"]:
  """Windows that a search sees, by the name of their set."""
  recipe = model.recipe
  rng = np.random.default_rng(CALIBRATION_SETS.index(calibration_set))
  windows = text.random_windows(
    model.calibration, rng, recipe.calibration_windows, recipe.context
  )
  if calibration_set != "text":
    windows = np.stack(
      [
        long_context_tasks.mixed_window(
          window, rng, recipe.base.mixture, recipe.base.density
        )
        for window in windows
      ]
    )
  return _in_batches(windows, min(_SEARCHED_BATCH, recipe.batch_size))


def measure_overlap(model: Model) -> dict[str, Any]:
  """Table 1: overlap of all pairs of layers, and recall."""
  recipe = model.recipe
  positions = np.linspace(
    recipe.config.index_topk, recipe.context - 1, recipe.overlap_positions
  ).astype(int)
  arguments = (
    recipe.config,
    model.params,
    model.held_out_batches[:, :1],
    positions.tolist(),
  )
  # A matrix a position.
  overlap, recall = (
    measure(*arguments).mean(axis=0)
    for measure in (analysis.model_overlap, analysis.model_recall)
  )
  return {"overlap": overlap.tolist(), "recall": recall.tolist()}


def measure_training_free(
  model: Model,
  searches: dict[str, dict[str, Any]],
  overlap: list[list[float]],
) -> dict[str, Any]:
  """Table 2: the base model under schedules of every rule.

  Args:
    model: the base model.
    searches: of `searches`.
    overlap: of `measure_overlap`, the only guide of the rule "by overlap".
  """
  loss_fn = ic.LayerwiseLoss(
    model.recipe.config, model.params, model.held_out_batches
  )
  schedules = _schedules(model, searches)
  for retention in paper_recipe.RETENTIONS:
    num_full = schedules[f"searched {retention}"].num_full
    schedules[f"by overlap {retention}"] = dynamic_programming.dp_schedule(
      np.asarray(overlap), num_full, (0,)
    )
  rows = [
    _row(model, loss_fn, name, schedule) for name, schedule in schedules.items()
  ]
  return {"rows": rows, "searches": searches}


def measure_single_layers(model: Model) -> dict[str, Any]:
  """Table 5: the base model without one layer's indexer, for each layer.

  At the longest length alone. The first layer has none to take indices of.
  """
  recipe = model.recipe
  num_layers = recipe.config.num_hidden_layers
  longest = max(recipe.lengths)
  batches = {
    (task, length): batch
    for (task, length), batch in model.task_batches.items()
    if length == longest
  }
  loss_fn = ic.LayerwiseLoss(
    recipe.config, model.params, model.held_out_batches
  )
  full = ic.ReuseSchedule.all_full(num_layers)
  schedules = {paper_recipe.FULL: full} | {
    f"without {layer}": ic.ReuseSchedule(
      full.pattern[:layer] + "S" + full.pattern[layer + 1 :]
    )
    for layer in range(1, num_layers)
  }
  rows = [
    _row(model, loss_fn, name, schedule, batches)
    for name, schedule in schedules.items()
  ]
  return {"rows": rows}


def measure_training_aware(
  model: Model, folder: pathlib.Path
) -> dict[str, Any]:
  """Table 3: each variant that was trained, under its own schedule."""
  rows = []
  for name in paper_recipe.VARIANTS:
    path = folder / paper_recipe.folder_name(name) / "checkpoint"
    if not path.exists():
      continue
    variant = model.with_variant(path)
    loss_fn = ic.LayerwiseLoss(
      model.recipe.config, variant.params, model.held_out_batches
    )
    schedule = ic.load_config(path).schedule
    rows.append(_row(variant, loss_fn, name, schedule))
  return {"rows": rows}


def measure_costs(
  model: Model, searches: dict[str, dict[str, Any]]
) -> dict[str, Any]:
  """Table 4: indexer work removed, and time of a prefill, of each schedule."""
  recipe = model.recipe
  batch = jnp.asarray(model.held_out_batches[0])
  times = {
    phase: op_times.measure_op_times(
      recipe.config, num_tokens=num_tokens, context=recipe.context
    )
    for phase, num_tokens in (("prefill", recipe.context), ("decode", 1))
  }
  rows = []
  for name, schedule in _schedules(model, searches).items():
    saved = costs.schedule_costs(
      recipe.config, schedule, context=recipe.context
    )
    row = {
      "schedule": name,
      "pattern": schedule.pattern,
      "indexer_compute_removed": saved.indexer_compute_removed,
      "prefill_seconds": _prefill_seconds(model, schedule, batch),
    }
    for phase, measured in times.items():
      predicted = op_times.predict_times(measured, schedule)
      row[f"predicted_{phase}_speedup"] = predicted.speedup
    rows.append(row)
  for row in rows:
    row["prefill_speedup"] = rows[0]["prefill_seconds"] / row["prefill_seconds"]
  return {
    "rows": rows,
    "context": recipe.context,
    "sequences": len(batch),
    "seconds_by_op": {
      phase: dataclasses.asdict(measured) for phase, measured in times.items()
    },
  }


def _schedules(model, searches):
  """All full, then uniform and searched schedules, by name."""
  num_layers = model.recipe.config.num_hidden_layers
  schedules = {paper_recipe.FULL: ic.ReuseSchedule.all_full(num_layers)}
  for retention in paper_recipe.RETENTIONS:
    schedules[f"uniform {retention}"] = ic.ReuseSchedule.uniform(
      num_layers, every=retention.denominator
    )
    schedules[f"searched {retention}"] = ic.ReuseSchedule(
      searches[CALIBRATION]["patterns"][str(retention)]
    )
  return schedules


def _row(model, loss_fn, name, schedule, batches=None):
  """Loss and accuracies under a schedule; None: of all tasks and lengths."""
  loss = loss_fn(schedule)
  found = evaluation.task_accuracies(
    model.recipe.config,
    model.params,
    model.task_batches if batches is None else batches,
    schedule=schedule,
    batch_size=model.recipe.batch_size,
  )
  print(
    f"{name:<28} {schedule.pattern}  loss {loss:.4f}  "
    + "  ".join(
      f"{entry.task}@{entry.length} {entry.accuracy.exact:.0%}"
      for entry in found
    )
  )
  return {
    "schedule": name,
    "pattern": schedule.pattern,
    "loss": loss,
    "accuracy": [
      {
        "task": entry.task,
        "length": entry.length,
        "count": entry.count,
        "exact": entry.accuracy.exact,
        "by_depth": entry.accuracy.by_depth,
      }
      for entry in found
    ],
  }


def _prefill_seconds(model, schedule, tokens):
  """Median time of a prefill, its logits of the last token."""
  layers = range(schedule.num_layers)
  is_full = jnp.array([schedule.is_full(layer) for layer in layers], jnp.int32)
  arguments = (model.recipe.config, model.params, tokens, is_full)
  jax.block_until_ready(_prefill(*arguments))
  seconds = []
  for _ in range(model.recipe.timed_calls):
    begin = time.perf_counter()
    jax.block_until_ready(_prefill(*arguments))
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)


@functools.partial(jax.jit, static_argnums=(0,))
def _prefill(config, params, tokens, is_full):
  logits, _ = ic.SparseTransformer(config).apply(
    {"params": params}, tokens, runtime_schedule=is_full, logits_for="last"
  )
  return logits


def _merge(first, second):
  """Nested dicts joined, the second's leaves before the first's."""
  if not isinstance(second, dict):
    return second
  joined = {
    key: _merge(first.get(key, {}), value) for key, value in second.items()
  }
  return first | joined


def _in_batches(windows, batch_size):
  return windows.reshape(-1, min(batch_size, len(windows)), windows.shape[1])
