# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A sweep's report: JSON for programs, Markdown and pictures for people."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

import indexcache_jax as ic
from experiments import common, plots
from indexcache_jax import comparison, costs, op_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """All that a sweep found.

  Attributes:
    model_name: what was searched.
    config: of the model, all full.
    rows: the compared schedules, at least one.
    context: tokens of a sequence.
    calibration_tokens: that the searches saw.
    held_out_tokens: that the losses are of.
    seed: of the random draws.
    max_loss_increase: that the recommendation tolerates, as a share.
    overlap: of the layers' selections on held-out text.
    op_times: of a prefill of `context` tokens on this machine.
    environment: provenance.
  """

  model_name: str
  config: ic.SparseTransformerConfig
  rows: list[comparison.ComparedSchedule]
  context: int
  calibration_tokens: int
  held_out_tokens: int
  seed: int
  max_loss_increase: float
  overlap: Float[np.ndarray, "L L"]
  op_times: op_times.OpTimes
  environment: dict[str, str]

  @property
  def baseline_loss(self) -> float:
    """Held-out loss of all full."""
    return self.rows[0].loss - self.rows[0].loss_delta


def write(report: Report, folder: pathlib.Path) -> str:
  """Writes the four files; returns the table and the advice to print."""
  data = as_json(report)
  common.write_text(folder / "report.json", json.dumps(data, indent=1))
  plots.losses_by_retention(
    folder / "loss_by_retention.png", data["schedules"], data["baseline_loss"]
  )
  plots.heatmap(
    folder / "overlap.png",
    report.overlap,
    title="Selected keys that two layers share",
    colour_label="share of the keys",
  )
  common.write_text(folder / "report.md", _markdown(data))
  return "\n\n".join(
    ["", _table(data), _advice(data), f"The whole report: {folder}/report.md"]
  )


def as_json(report: Report) -> dict[str, Any]:
  """Returns the report as report.json has it."""
  chosen, is_within = comparison.recommend(
    report.rows, max_loss_increase=report.max_loss_increase
  )
  adjacent = np.diagonal(report.overlap, offset=-1)
  return {
    "baseline_loss": report.baseline_loss,
    "calibration_tokens": report.calibration_tokens,
    "held_out_tokens": report.held_out_tokens,
    "context": report.context,
    "num_layers": report.config.num_hidden_layers,
    "index_topk": report.config.index_topk,
    "checkpoint": report.model_name,
    "seed": report.seed,
    "environment": report.environment,
    "schedules": [_row(report, row) for row in report.rows],
    "searches": _searches(report.rows),
    "overlap": report.overlap.tolist(),
    "adjacent_overlap_mean": float(np.mean(adjacent)),
    "prefill_seconds_by_op": dataclasses.asdict(report.op_times),
    "recommendation": {
      "method": chosen.method,
      "pattern": chosen.schedule.pattern,
      "loss_delta": chosen.loss_delta,
      "max_loss_increase": report.max_loss_increase,
      "within_tolerance": is_within,
      "overrides": chosen.schedule.engine_lines(),
    },
  }


def _row(report, row):
  schedule = row.schedule
  saved = costs.schedule_costs(report.config, schedule, context=report.context)
  return {
    "method": row.method,
    "retention": str(row.retention),
    "pattern": schedule.pattern,
    "num_full": schedule.num_full,
    "share": schedule.retention,
    "loss": row.loss,
    "loss_delta": row.loss_delta,
    "indexer_compute_removed": saved.indexer_compute_removed,
    "index_key_bytes_removed": saved.index_key_bytes_removed,
    "predicted_prefill_speedup": op_times.predict_times(
      report.op_times, schedule
    ).speedup,
    "evaluations": row.evaluations,
  }


def _searches(rows):
  """The whole trace of each greedy search, by method."""
  searches = {row.method: row.search for row in rows if row.search}
  return {
    method: {
      "evaluations": search.evaluations,
      "layer_forwards": search.layer_forwards,
      "trace": [dataclasses.asdict(step) for step in search.trace],
    }
    for method, search in searches.items()
  }


def _table(data):
  """The comparison as aligned text, which is Markdown too."""
  header = [
    *("method", "kept", "full", "pattern", "loss", "change", "change %"),
    *("indexer compute", "index keys", "prefill", "losses asked"),
  ]
  body = [
    [
      row["method"],
      row["retention"],
      f"{row['num_full']}/{data['num_layers']}",
      row["pattern"],
      f"{row['loss']:.4f}",
      f"{row['loss_delta']:+.4f}",
      f"{100 * row['loss_delta'] / data['baseline_loss']:+.2f}",
      f"-{100 * row['indexer_compute_removed']:.0f} %",
      f"-{100 * row['index_key_bytes_removed']:.0f} %",
      f"{row['predicted_prefill_speedup']:.2f}x",
      str(row["evaluations"]),
    ]
    for row in data["schedules"]
  ]
  widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
  rule = ["-" * width for width in widths]
  return "\n".join(
    "| "
    + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
    + " |"
    for line in (header, rule, *body)
  )


def _advice(data):
  chosen = data["recommendation"]
  limit = f"{100 * chosen['max_loss_increase']:g} %"
  reason = (
    f"the fewest indexers whose loss grows by at most {limit}"
    if chosen["within_tolerance"]
    else f"none keeps the loss within {limit}, so the one of least loss"
  )
  change = 100 * chosen["loss_delta"] / data["baseline_loss"]
  lines = [
    f"All full: loss {data['baseline_loss']:.4f} nats a token.",
    f"Recommended ({reason}): {chosen['pattern']}, found by"
    f" {chosen['method']}, {change:+.2f} %.",
    *(f"  {engine}: {line}" for engine, line in chosen["overrides"].items()),
  ]
  return "\n".join(lines)


def _markdown(data):
  environment = ", ".join(f"{k} {v}" for k, v in data["environment"].items())
  return f"""# Reuse schedules of {data["checkpoint"]}

{data["num_layers"]} layers, index_topk {data["index_topk"]}, sequences of
{data["context"]} tokens. Searched on {data["calibration_tokens"]:,} tokens;
losses are of {data["held_out_tokens"]:,} others, in nats a token. All full:
{data["baseline_loss"]:.4f}.

{environment}.

{_table(data)}

"change" is against all full; "indexer compute" and "index keys" are what reuse
removes of each; "prefill" is the speed-up that the op times of this machine
predict for {data["context"]} tokens; "losses asked" counts evaluations on
calibration text.

![Loss by share of indexers kept](loss_by_retention.png)

## Recommended

```
{_advice(data)}
```

## Overlap

Adjacent layers share {100 * data["adjacent_overlap_mean"]:.0f} % of their
selected keys on average, over queries that see more than index_topk keys.

![Overlap of the layers' selections](overlap.png)

{_traces(data)}"""


def _traces(data):
  num_layers = data["num_layers"]
  full_sweep = num_layers * (num_layers - 1) // 2
  sections = []
  for method, search in data["searches"].items():
    steps = "\n".join(
      f"| {num_layers - number} | {step['layer']} | {step['pattern']} |"
      f" {step['loss']:.4f} |"
      for number, step in enumerate(search["trace"], 1)
    )
    sections.append(f"""## Search: {method}

{search["evaluations"]} evaluations, {search["layer_forwards"]} layer passes.
The paper's full sweep is {full_sweep} evaluations of {num_layers} layers,
{full_sweep * num_layers} layer passes. One search serves every retention:

| full | flipped | pattern | calibration loss |
|---|---|---|---|
{steps}
""")
  return "\n".join(sections)
