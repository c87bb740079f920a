# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes the tables of the paper's experiment from the runs of some seeds.

Claims (IndexCache, arXiv 2603.12201): adjacent layers share most indices; of
1/4 of the indexers a uniform schedule loses and a searched one does not; the
multi-layer loss makes uniform schedules as good as full; 1/8 degrades even when
searched; overlap alone is a bad guide.

  python -m experiments.paper_tables --dtype=bfloat16 --table=training_free \
    --runs=runs/paper/seed0,runs/paper/seed1,runs/paper/seed2

Tables: overlap (1), training_free (2), training_aware (3), costs (4),
single_layers (5: without one layer's indexer); without --table all. What is not
measured yet is, into a JSON file in the seed's folder; with these files alone,
the models being elsewhere, the tables are made again. Expected: a .json, .md
and .png a table in --output_dir, each row the mean over seeds with its spread;
training_log.csv, where a folder has logs; and, with tables 1 to 3 there,
claims.md, which says of each claim whether it held.
"""

import json
import pathlib

import jax.numpy as jnp
from absl import flags, logging

from experiments import (
  common,
  inputs,
  paper_claims,
  paper_log,
  paper_measurements,
  paper_recipe,
  paper_report,
)

_RUNS = flags.DEFINE_list(
  "runs", ["runs/paper/seed0"], "Folders of `paper_runs`, one a seed."
)
_TABLES = flags.DEFINE_multi_enum(
  "table", list(paper_report.TABLES), list(paper_report.TABLES), "To make."
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "results/paper", "Where tables and plots go."
)


def main(argv):
  """Measures what is missing, then writes and prints the tables."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  folders = [pathlib.Path(name).absolute() for name in _RUNS.value]
  if not folders:
    raise ValueError("--runs must name at least one folder: got none.")
  seeds = [_Seed(folder) for folder in folders]
  output_dir = pathlib.Path(_OUTPUT_DIR.value)
  paper_log.write(folders, output_dir / "training_log.csv")
  for table in dict.fromkeys(_TABLES.value):
    print(
      paper_report.write(table, [s.measured(table) for s in seeds], output_dir)
    )
  print(paper_claims.write(output_dir) or "")


class _Seed:
  """The measurements of one seed, each taken when it is first asked for."""

  def __init__(self, folder):
    self._folder = folder
    self._model = None

  def measured(self, table):
    """The content of a table's file, which is written if it is not there."""
    path = self._folder / f"{table}.json"
    if not path.exists():
      measurement = self._measure(table)
      record = {
        "table": table,
        "seed": self._seed(),
        **paper_measurements.source(),
        **measurement,
      }
      common.write_text(path, json.dumps(record, indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))

  def _measure(self, table):
    model = self._base_model()
    print(f"Measuring {table} of {self._folder.name} ...")
    if table == "overlap":
      return paper_measurements.measure_overlap(model)
    if table == "single_layers":
      return paper_measurements.measure_single_layers(model)
    if table == "training_aware":
      return paper_measurements.measure_training_aware(model, self._folder)
    if table == "costs":
      return paper_measurements.measure_costs(model, self._searches())
    return paper_measurements.measure_training_free(
      model, self._searches(), self.measured("overlap")["overlap"]
    )

  def _base_model(self):
    if self._model is None:
      path = self._folder / "base" / "checkpoint"
      if not path.exists():
        raise ValueError(
          "--runs must name folders that hold a base model or the table's"
          f" measurements: got {self._folder}, which has neither. Train it"
          " with `python -m experiments.paper_runs`, to its end."
        )
      recipe = paper_recipe.recipe(
        self._seed(),
        dtype=jnp.dtype(inputs.DTYPE.value),
        smoke=inputs.SMOKE.value,
      )
      self._model = paper_measurements.Model.load(recipe, path)
    return self._model

  def _seed(self):
    settings = (self._folder / "base" / "settings.json").read_text()
    return int(json.loads(settings)["seed"])

  def _searches(self):
    return paper_measurements.searches(
      self._folder / "search.json", self._base_model
    )


if __name__ == "__main__":
  common.run(main)
