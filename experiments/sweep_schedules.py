# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a reuse schedule: what each one costs and saves.

Claim (IndexCache, arXiv 2603.12201, table 2): most layers can take the indices
of an earlier one without retraining if the layers are chosen by a search;
taken at equal distances they can't.

  python -m experiments.sweep_schedules                      # or: make sweep
  python -m experiments.sweep_schedules --checkpoint=DIR --dtype=bfloat16 \
    --text='corpus/*.txt' --context=65536 --calibration_tokens=1048576

Expected on the embedded model: at 1/4 the searched schedule costs a fraction
of the uniform one's loss (`results/sweep` has the figures); under 6 minutes on
2 CPU cores. Writes report.json, report.md and two pictures to --output_dir. A
sweep that is interrupted goes on where it was when the command is repeated.
"""

import dataclasses
import fractions
import pathlib

import numpy as np
from absl import flags, logging

import indexcache_jax as ic
from experiments import common, inputs, search_progress, sweep_report
from indexcache_jax import analysis, comparison, methods, op_times

_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "sweep_output", "Where the report goes."
)
_RETENTION = flags.DEFINE_list(
  "retention", ["1/2", "1/4", "1/8"], "Shares of the indexers to keep."
)
_METHODS = flags.DEFINE_list(
  "methods",
  ["uniform", "uniform_freq", "random", "dynamic_programming", "greedy"],
  f"Any of {', '.join(ic.METHODS)}.",
)
_CALIBRATION_TOKENS = flags.DEFINE_integer(
  "calibration_tokens", 8192, "Tokens that a search sees.", lower_bound=2
)
_HELD_OUT_TOKENS = flags.DEFINE_integer(
  "held_out_tokens", 8192, "Tokens that the report's loss is of.", lower_bound=2
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 4, "Sequences run at once.", lower_bound=1
)
_RANDOM_DRAWS = flags.DEFINE_integer(
  "random_draws", 3, "Draws of the random method.", lower_bound=1
)
_PINNED = flags.DEFINE_multi_integer(
  "pinned", [0], "Layers that stay full; 0 always does."
)
_BLOCKS = flags.DEFINE_integer(
  "blocks", None, "Pipeline stages, each beginning with a full layer."
)
_MAX_LOSS_INCREASE = flags.DEFINE_float(
  "max_loss_increase", 0.01, "Tolerated by the recommendation, as a share."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
  """The flags, checked."""

  retentions: tuple[fractions.Fraction, ...]
  methods: tuple[str, ...]
  calibration_tokens: int
  held_out_tokens: int
  batch_size: int
  context: int


def main(argv):
  """Loads, searches, compares, reports."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  retentions, names = parse_retentions(_RETENTION.value), parse_methods()
  model = inputs.load_model()
  sweep = _config(model, retentions, names)
  calibration, held_out = _batches(model, sweep)
  output_dir = pathlib.Path(_OUTPUT_DIR.value)
  output_dir.mkdir(parents=True, exist_ok=True)
  calibration_loss = ic.LayerwiseLoss(model.config, model.params, calibration)
  progress = search_progress.SearchProgress(
    output_dir / "search_state.json",
    search_progress.fingerprint(model.config, calibration, calibration_loss),
  )
  rows = _compare(
    model, sweep, calibration, held_out, calibration_loss, progress
  )
  print("Measuring the overlap of selections and this machine's times ...")
  report = sweep_report.Report(
    model_name=model.name,
    config=model.config,
    rows=rows,
    context=sweep.context,
    calibration_tokens=calibration.size,
    held_out_tokens=held_out.size,
    seed=inputs.SEED.value,
    max_loss_increase=_MAX_LOSS_INCREASE.value,
    overlap=analysis.model_overlap(model.config, model.params, held_out[:1]),
    op_times=op_times.measure_op_times(
      model.config, num_tokens=sweep.context, context=sweep.context
    ),
    environment=common.environment(),
  )
  print(sweep_report.write(report, output_dir))
  progress.remove()


def parse_retentions(words: list[str]) -> tuple[fractions.Fraction, ...]:
  """Reads "1/4" or "0.25"."""
  retentions = []
  for word in words:
    try:
      retention = fractions.Fraction(word)
    except (ValueError, ZeroDivisionError):
      retention = fractions.Fraction(0)
    if not 0 < retention <= 1:
      raise ValueError(
        "--retention must list shares of the indexers above 0, at most 1: got"
        f" {word!r}. For example --retention=1/2,1/4."
      )
    retentions.append(retention)
  if not retentions:
    raise ValueError("--retention must list at least one share: got none.")
  return tuple(dict.fromkeys(retentions))


def parse_methods() -> tuple[str, ...]:
  """Checks the names of --methods."""
  unknown = [name for name in _METHODS.value if name not in ic.METHODS]
  if unknown or not _METHODS.value:
    raise ValueError(
      f"--methods must list any of {', '.join(ic.METHODS)}: got"
      f" {', '.join(unknown) or 'none'}. A method of your own goes into"
      " `indexcache_jax.comparison.compare`."
    )
  return tuple(dict.fromkeys(_METHODS.value))


def _config(model, retentions, names):
  context = model.context
  sweep = SweepConfig(
    retentions=retentions,
    methods=names,
    calibration_tokens=_CALIBRATION_TOKENS.value,
    held_out_tokens=_HELD_OUT_TOKENS.value,
    batch_size=_BATCH_SIZE.value,
    context=context,
  )
  if inputs.SMOKE.value:
    sweep = dataclasses.replace(
      sweep, calibration_tokens=256, held_out_tokens=256, context=128
    )
  topk = model.config.index_topk
  if sweep.context <= topk:
    raise ValueError(
      "--context must exceed the model's index_topk, or every schedule selects"
      f" all keys: got {sweep.context} for index_topk={topk}. Try"
      f" --context={4 * topk}."
    )
  return sweep


def _batches(model, sweep):
  """Token batches [M, B, T] to search on and to report on."""
  calibration, held_out = inputs.split_tokens(model)
  return tuple(
    inputs.spread_batches(tokens, count, sweep.context, sweep.batch_size)
    for tokens, count in (
      (calibration, sweep.calibration_tokens),
      (held_out, sweep.held_out_tokens),
    )
  )


def _compare(model, sweep, calibration, held_out, calibration_loss, progress):
  """Runs all methods; returns their schedules with held-out losses."""

  def problem(name):
    print(f"{name}:")
    return methods.SearchProblem(
      loss_fn=calibration_loss,
      num_layers=model.config.num_hidden_layers,
      pinned=_PINNED.value,
      blocks=_BLOCKS.value,
      seed=_seed(name),
      similarity=lambda: _similarity(model, calibration),
      state=progress.state(name),
      on_evaluation=progress.callback(name),
    )

  rows = []
  for row in comparison.compare(
    _chosen_methods(sweep.methods),
    problem,
    sweep.retentions,
    ic.LayerwiseLoss(model.config, model.params, held_out),
  ):
    progress.close_bar()
    print(
      f"  {row.retention!s:>5}  {row.schedule}  {row.loss:.4f}"
      f" ({row.loss_delta:+.4f})"
    )
    rows.append(row)
  return rows


def _chosen_methods(names):
  """Methods by name; a draw of the random one is a method of its own."""
  chosen = {}
  for name in names:
    if name != "random":
      chosen[name] = ic.METHODS[name]
      continue
    for draw in range(_RANDOM_DRAWS.value):
      chosen[f"random-{draw}"] = ic.METHODS["random"]
  return chosen


def _seed(name):
  draw = int(name.removeprefix("random-")) if name.startswith("random-") else 0
  return inputs.SEED.value + draw


def _similarity(model, calibration) -> np.ndarray:
  # One batch: every layer's attention runs under every other's selection.
  return analysis.attention_similarity(
    model.config, model.params, calibration[:1]
  )


if __name__ == "__main__":
  common.run(main)
