# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The logs of all trainings of the paper's experiment, in one small table."""

import csv
import io
import json
import pathlib
import statistics
from collections.abc import Sequence

from experiments import common, paper_recipe

# Steps that a line is the mean of.
_STEPS = 20
_MEANS = ("loss", "index_kl", "grad_norm")
_HEAD = ("seed", "part", "stage", "first_step", "steps", *_MEANS, "seconds")


def write(folders: Sequence[pathlib.Path], path: pathlib.Path) -> None:
  """Writes a line for every 20 steps of each training.

  Args:
    folders: of `paper_runs`, one a seed; of some only measurements may be left.
    path: of the CSV: means, and the median of the seconds of a step. The lines
      that it has of seeds without logs here stay.
  """
  lines = [line for folder in folders for line in _lines(folder)]
  if not lines:
    return
  seeds = {line[0] for line in lines}
  lines = [line for line in _written(path) if line[0] not in seeds] + lines
  lines.sort(key=lambda line: int(line[0]))
  content = io.StringIO()
  csv.writer(content, lineterminator="\n").writerows([_HEAD, *lines])
  common.write_text(path, content.getvalue())


def _written(path):
  if not path.exists():
    return []
  _, *lines = csv.reader(path.read_text().splitlines())
  return lines


def _lines(folder):
  for part in ("base", *map(paper_recipe.folder_name, paper_recipe.VARIANTS)):
    path = folder / part / "log.jsonl"
    if not path.exists():
      continue
    settings = json.loads((folder / part / "settings.json").read_text())
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for group in _groups(records):
      yield (
        settings["seed"],
        part,
        group[0]["stage"],
        group[0]["step"],
        len(group),
        *(f"{statistics.fmean(r[key] for r in group):.5g}" for key in _MEANS),
        f"{statistics.median(r['seconds'] for r in group):.4g}",
      )


def _groups(records):
  """Neighbouring steps of a stage, up to 20."""
  group = []
  for record in records:
    if group and (len(group) == _STEPS or record["stage"] != group[0]["stage"]):
      yield group
      group = []
    group.append(record)
  if group:
    yield group
