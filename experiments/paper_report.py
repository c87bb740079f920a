# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The paper's tables from the measurements of several seeds."""

import fractions
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import common, paper_measurements, paper_recipe, plots

# One seed's measurement of a table, or a table: what its JSON file holds.
Record = Mapping[str, Any]


def write(table: str, records: Sequence[Record], folder: pathlib.Path) -> str:
  """Writes a table's .json, .md and .png; returns the Markdown.

  Args:
    table: a name of `TABLES`.
    records: one a seed, as `paper_measurements` takes them.
    folder: of the files.

  Raises:
    ValueError: a seed twice, or seeds of different rows.
  """
  seeds = [record["seed"] for record in records]
  if len(set(seeds)) < len(seeds):
    raise ValueError(f"--runs must be of distinct seeds: got seeds {seeds}.")
  summary, body = TABLES[table](records, folder)
  content = {
    "table": table,
    "seeds": seeds,
    "commands": [record["command"] for record in records],
    "environments": [record["environment"] for record in records],
    **summary,
  }
  common.write_text(
    folder / f"{table}.json", json.dumps(content, indent=1) + "\n"
  )
  markdown = f"{body}\n\n{_provenance(records)}\n"
  common.write_text(folder / f"{table}.md", markdown)
  return markdown


def _overlap(records, folder):
  matrices = np.array([record["overlap"] for record in records])
  adjacent = [float(np.mean(np.diagonal(m, -1))) for m in matrices]
  lags = range(1, matrices.shape[1])
  by_lag = {
    lag: summary([float(np.mean(np.diagonal(m, -lag))) for m in matrices])
    for lag in lags
  }
  mean = matrices.mean(axis=0)
  plots.heatmap(
    folder / "overlap.png",
    mean,
    title="Selected keys that two layers share, mean over seeds",
    colour_label="share of the keys",
  )
  lowest = [float(np.min(np.diagonal(m, -1))) for m in matrices]
  recall = [
    float(np.mean(np.diagonal(np.array(record["recall"]), -1)))
    for record in records
  ]
  rows = [
    ("adjacent layers, mean", summary(adjacent)),
    ("adjacent layers, least", summary(lowest)),
    ("attention mass on the keys of the layer before", summary(recall)),
    *((f"{lag} layers apart", by_lag[lag]) for lag in lags if lag > 1),
  ]
  body = _markdown(
    "Table 1: overlap of the layers' selections",
    ["pairs", "share"],
    [(name, _cell(value)) for name, value in rows],
  )
  return {
    "adjacent": summary(adjacent),
    "by_lag": by_lag,
    "mean_overlap": mean.tolist(),
  }, body


def _accuracies(title, picture):
  """Tables 2 and 3, which differ in their rows."""

  def table(records, folder):
    rows = _joined_rows(records)
    tasks, lengths = _tasks_and_lengths(records)
    summaries = {
      name: _summarise(entries, rows[paper_recipe.FULL])
      for name, entries in rows.items()
    }
    picture(folder, summaries)
    head = [
      "schedule",
      "full layers",
      "loss",
      "change",
      "mean accuracy",
      *tasks,
    ]
    lines = [
      (
        name,
        f"{_num_full(rows[name])}",
        *(_cell(entry[key], 4) for key in ("loss", "loss_change")),
        _cell(entry["accuracy"]),
        *(_cell(entry["tasks"][task][lengths[-1]]) for task in tasks),
      )
      for name, entry in summaries.items()
    ]
    parts = [
      _markdown(title, head, lines),
      'Accuracy is the share of answers right in every byte; "mean accuracy"'
      " is over all tasks, lengths and depths, a task's column at"
      f" {lengths[-1]} tokens.",
      _by_length(summaries, tasks, lengths),
      _by_depth(summaries, tasks, lengths[-1]),
      _patterns(rows),
    ]
    content = {"rows": summaries, "patterns": _row_patterns(rows)}
    if "searches" in records[0]:
      content["stability"] = _stability(records)
      parts.append(_stability_table(content["stability"]))
    return content, "\n\n".join(parts)

  return table


def _single_layers(records, folder):
  rows = _joined_rows(records)
  tasks, [length] = _tasks_and_lengths(records)
  seeds = [record["seed"] for record in records]
  summaries = {
    name: _summarise(entries, rows[paper_recipe.FULL])
    for name, entries in rows.items()
  }
  layers = [e for name, e in summaries.items() if name != paper_recipe.FULL]
  plots.lines_by_layer(
    folder / "single_layers.png",
    {
      f"seed {seed}": [entry["accuracy"]["values"][place] for entry in layers]
      for place, seed in enumerate(seeds)
    },
    label="mean accuracy without that layer's indexer",
  )
  columns = ("change of loss", *tasks)
  lines = [
    (
      name,
      *(f"{change:+.4f}" for change in entry["loss_change"]["values"]),
      *(
        f"{share:.3f}"
        for task in tasks
        for share in entry["tasks"][task][length]["values"]
      ),
    )
    for name, entry in summaries.items()
  ]
  body = _markdown(
    f"Table 5: without one layer's indexer, at {length} tokens, each seed",
    ["indexers", *(f"{word} {seed}" for word in columns for seed in seeds)],
    lines,
  )
  return {"rows": summaries}, body


def _costs(records, folder):
  rows = _joined_rows(records)
  keys = (
    "indexer_compute_removed",
    "prefill_speedup",
    "predicted_prefill_speedup",
    "predicted_decode_speedup",
  )
  summaries = {
    name: {key: summary([entry[key] for entry in entries]) for key in keys}
    for name, entries in rows.items()
  }
  _plot_by_rule(
    folder / "costs.png",
    summaries,
    lambda entry: entry["prefill_speedup"],
    "speed-up of a prefill",
  )
  body = _markdown(
    f"Table 4: what reuse saves at {records[0]['context']} tokens",
    ["schedule", *(key.replace("_", " ") for key in keys)],
    [
      (name, *(_cell(entry[key]) for key in keys))
      for name, entry in summaries.items()
    ],
  )
  return {"rows": summaries}, body


def summary(values: Sequence[float]) -> dict[str, Any]:
  """Mean, spread (the sample's standard deviation) and the values."""
  return {
    "mean": statistics.fmean(values),
    "spread": statistics.stdev(values) if len(values) > 1 else None,
    "values": list(values),
  }


def _joined_rows(records):
  """Rows of all seeds by schedule; every seed has the same ones."""
  names = [[row["schedule"] for row in record["rows"]] for record in records]
  if any(other != names[0] for other in names) or (
    paper_recipe.FULL not in names[0]
  ):
    raise ValueError(
      "--runs must have the same rows, the one of all full among them: got"
      f" {names}. Finish `paper_runs` of every seed and remove the"
      " measurement files that were taken before."
    )
  return {
    name: [record["rows"][place] for record in records]
    for place, name in enumerate(names[0])
  }


def _tasks_and_lengths(records):
  entries = records[0]["rows"][0]["accuracy"]
  return (
    list(dict.fromkeys(entry["task"] for entry in entries)),
    sorted({entry["length"] for entry in entries}),
  )


def _summarise(entries, full):
  """Loss, its change against the same seed's all full, and accuracies."""
  by_task: dict[str, dict[int, list[float]]] = {}
  by_depth: dict[str, dict[int, dict[float, list[float]]]] = {}
  for entry in entries:
    for found in entry["accuracy"]:
      task, length = found["task"], found["length"]
      values = by_task.setdefault(task, {}).setdefault(length, [])
      values.append(found["exact"])
      depths = by_depth.setdefault(task, {}).setdefault(length, {})
      for depth, share in found["by_depth"]:
        depths.setdefault(depth, []).append(share)
  means = [
    statistics.fmean(found["exact"] for found in entry["accuracy"])
    for entry in entries
  ]
  return {
    "loss": summary([entry["loss"] for entry in entries]),
    "loss_change": summary(
      [
        entry["loss"] - other["loss"]
        for entry, other in zip(entries, full, strict=True)
      ]
    ),
    "accuracy": summary(means),
    "tasks": {
      task: {length: summary(values) for length, values in lengths.items()}
      for task, lengths in by_task.items()
    },
    "depths": {
      task: {
        length: {depth: summary(values) for depth, values in depths.items()}
        for length, depths in lengths.items()
      }
      for task, lengths in by_depth.items()
    },
  }


def _by_length(summaries, tasks, lengths):
  pairs = [(task, length) for task in tasks for length in lengths]
  return _markdown(
    "By length",
    ["schedule", *(f"{task} {length}" for task, length in pairs)],
    [
      (name, *(_cell(entry["tasks"][task][length]) for task, length in pairs))
      for name, entry in summaries.items()
    ],
    level=2,
  )


def _by_depth(summaries, tasks, length):
  depths = list(next(iter(summaries.values()))["depths"][tasks[0]][length])
  pairs = [(task, depth) for task in tasks for depth in depths]
  return _markdown(
    f"By depth, at {length} tokens (0: the beginning)",
    ["schedule", *(f"{task} {depth:g}" for task, depth in pairs)],
    [
      (
        name,
        *(_cell(entry["depths"][task][length][depth]) for task, depth in pairs),
      )
      for name, entry in summaries.items()
    ],
    level=2,
  )


def _row_patterns(rows):
  return {
    name: [entry["pattern"] for entry in entries]
    for name, entries in rows.items()
  }


def _patterns(rows):
  return _markdown(
    "Patterns, one a seed or one for all",
    ["schedule", "patterns"],
    [
      (
        name,
        ", ".join(
          f"`{word}`" for word in (words if len(set(words)) > 1 else words[:1])
        ),
      )
      for name, words in _row_patterns(rows).items()
    ],
    level=2,
  )


def _num_full(entries):
  counts = {entry["pattern"].count("F") for entry in entries}
  return "/".join(map(str, sorted(counts)))


def _stability(records):
  """Share of the full layers that two calibration sets agree on."""
  first, *others = paper_measurements.CALIBRATION_SETS
  return {
    other: {
      retention: summary(
        [
          _agreement(
            record["searches"][first]["patterns"][retention],
            record["searches"][other]["patterns"][retention],
          )
          for record in records
        ]
      )
      for retention in records[0]["searches"][first]["patterns"]
    }
    for other in others
  }


def _agreement(first, second):
  """Of full layers other than 0, which no search can flip."""
  pairs = list(zip(first[1:], second[1:], strict=True))
  num_full = sum(a == "F" for a, _ in pairs)
  both = sum(a == b == "F" for a, b in pairs)
  return both / num_full if num_full else 1.0


def _stability_table(stability):
  retentions = list(next(iter(stability.values())))
  return _markdown(
    "Full layers (but the first) that a search on"
    f" {paper_measurements.CALIBRATION!r} shares with one on another set",
    ["other set", *retentions],
    [
      (name, *(_cell(by_retention[word]) for word in retentions))
      for name, by_retention in stability.items()
    ],
    level=2,
  )


def _plot_training_free(folder, summaries):
  for key, label in (
    ("loss", "held-out loss (nats a token)"),
    ("accuracy", "mean accuracy of the tasks"),
  ):
    _plot_by_rule(
      folder / f"training_free_{key}.png",
      summaries,
      lambda entry, key=key: entry[key],
      label,
    )


def _plot_training_aware(folder, summaries):
  plots.bars(
    folder / "training_aware.png",
    {name: entry["accuracy"]["values"] for name, entry in summaries.items()},
    label="mean accuracy of the tasks",
  )


def _plot_by_rule(path, summaries, value_of: Callable, label):
  """A line a rule over the share of indexers kept, all full in each."""
  curves: dict[str, list] = {}
  full = value_of(summaries[paper_recipe.FULL])
  for name, entry in summaries.items():
    if name == paper_recipe.FULL:
      continue
    rule, _, retention = name.rpartition(" ")
    curves.setdefault(rule, [(1.0, full["values"])]).append(
      (float(fractions.Fraction(retention)), value_of(entry)["values"])
    )
  plots.curves_by_retention(path, curves, label=label)


def _markdown(title, head, lines, *, level=1):
  return f"{'#' * level} {title}\n\n{common.markdown_table(head, lines)}"


def _cell(value, digits=2):
  """A mean with its spread; the spread of one seed is unknown."""
  words = f"{value['mean']:.{digits}f}"
  if value["spread"] is None:
    return words
  return f"{words} ± {value['spread']:.{digits}f}"


def _provenance(records):
  lines = [
    f"- seed {record['seed']}: `{record['command']}`; "
    + ", ".join(f"{k} {v}" for k, v in record["environment"].items())
    for record in records
  ]
  plural = "seed" if len(records) == 1 else "seeds"
  return "\n".join(
    [
      f"{len(records)} {plural}; after ± the standard deviation over seeds.",
      "",
      *lines,
    ]
  )


TABLES: Mapping[str, Callable] = {
  "overlap": _overlap,
  "training_free": _accuracies(
    "Table 2: schedules without training", _plot_training_free
  ),
  "training_aware": _accuracies(
    "Table 3: models trained under their schedule", _plot_training_aware
  ),
  "costs": _costs,
  "single_layers": _single_layers,
}
