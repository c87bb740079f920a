# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables and plot of `bench_inference`: ratios beside what kernels account for.

The column "by kernel times" is Amdahl's law for the profiled kernels of the
removed indexers. A model gains more: their launches go too, and in a long
prefill, probably, the clock rises when the power of the scores is saved.
"""

import json
import pathlib

import numpy as np

from experiments import common, plots

_HEAD = (
  "phase",
  "context",
  "index keys",
  "schedule",
  "time",
  "speed-up",
  "by kernel times",
)
# The number of a record that says its phase's time.
_TIMES = {"prefill": "seconds", "decode": "ms_per_token"}
_UNITS = {"prefill": "s", "decode": "ms"}


def read_profile(path: str | None) -> list[dict]:
  """Records of `profile_layer`; none without a path."""
  if path is None:
    return []
  lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines]


def times(records: list[dict], phase: str) -> dict:
  """Of one request, by dtype of the index keys, schedule and context."""
  return {
    (r["index_keys"], r["schedule"], r["context"]): (
      r[_TIMES[phase]],
      r["num_full"],
    )
    for r in records
    if r["metric"] == phase and r.get("batch", 1) == 1
  }


def table(records: list[dict], profile: list[dict]) -> str:
  """A line a time, with its ratio to the all-full schedule of its dtype."""
  rows = []
  for phase, unit in _UNITS.items():
    found = times(records, phase)
    for (keys, name, context), (taken, num_full) in sorted(
      found.items(), key=lambda one: (one[0][0], -one[1][1], one[0][2])
    ):
      base = found.get((keys, "full", context))
      ratio = limit = ""
      if base is not None:
        ratio = f"{base[0] / taken:.3g}x"
        limit = amdahl_limit(profile, phase, keys, context, base, num_full)
        limit = f"{limit:.3g}x" if limit is not None else ""
      place = (phase, str(context), keys, name)
      rows.append((*place, f"{taken:.4g} {unit}", ratio, limit))
  return common.markdown_table(_HEAD, [*rows, *_batch_rows(records)])


def _batch_rows(records):
  """Of as many requests as fit, which are more where caches are smaller."""
  found = {
    (r["index_keys"], r["context"], -r["num_full"], r["schedule"]): r
    for r in records
    if r["metric"] == "decode" and r.get("batch", 1) > 1
  }
  base = {
    (r["index_keys"], r["context"]): r["tokens_per_second"]
    for r in found.values()
    if r["schedule"] == "full"
  }
  rows = []
  for (keys, context, *_), r in sorted(found.items()):
    rate = r["tokens_per_second"]
    full = base.get((keys, context))
    ratio = f"{rate / full:.3g}x" if full else ""
    place = (f"decode, batch {r['batch']}", str(context), keys, r["schedule"])
    rows.append((*place, f"{rate:.4g} tokens/s", ratio, ""))
  return rows


def indexer_table(records: list[dict]) -> str:
  """What one indexer costs in the running model, and all the rest.

  Time is a line in the number of full layers, which least squares fits over
  the schedules; the slope is an indexer with its launches and, for long
  prefills, what its power takes from the clock. "If free" is the speed-up of a
  model whose indexers cost nothing.
  """
  head = ("phase", "context", "index keys", "an indexer", "the rest")
  head = (*head, "largest misfit", "if free")
  rows = []
  for phase, unit in _UNITS.items():
    found = times(records, phase)
    for keys, context in dict.fromkeys((k, c) for k, _, c in found):
      points = [
        (num_full, taken)
        for (k, _, c), (taken, num_full) in found.items()
        if (k, c) == (keys, context)
      ]
      if len(points) < 3:
        continue
      num_full, taken = np.array(points).T
      line = np.polynomial.Polynomial.fit(num_full, taken, 1).convert()
      rest, each = line.coef
      misfit = np.max(np.abs(line(num_full) / taken - 1))
      times_found = (f"{each:.3g} {unit}", f"{rest:.3g} {unit}")
      gain = f"{taken.max() / rest:.3g}x"
      rows.append(
        (phase, str(context), keys, *times_found, f"{misfit:.1%}", gain)
      )
  return common.markdown_table(head, rows)


def amdahl_limit(
  profile: list[dict],
  phase: str,
  keys: str,
  context: int,
  base: tuple[float, int],
  num_full: int,
) -> float | None:
  """The speed-up if the removed indexers' kernel time alone went away.

  An indexer's time in a chunk is linear in its place, so a prefill's is the
  integral over the places that were profiled.

  Args:
    profile: records of `profile_layer`.
    phase: "prefill" or "decode".
    keys: dtype of the index keys.
    context: tokens of the prompt.
    base: seconds of a prefill or milliseconds of a token, and full layers, of
      the schedule without reuse.
    num_full: full layers of the schedule.

  Returns:
    None where nothing of the kind was profiled.
  """
  totals = {
    (r["layer"], r["context"]): (r["ms"], r["tokens"])
    for r in profile
    if r["phase"] == phase and r["kind"] == "all" and r["index_keys"] == keys
  }
  places = sorted({place for _, place in totals})
  if not places:
    return None
  indexer = [
    totals["full", place][0] - totals["shared", place][0] for place in places
  ]
  taken, layers = base
  if phase == "decode":
    removed = np.interp(context, places, indexer)
  else:
    chunk = totals["full", places[0]][1]
    ends = np.arange(chunk, context + chunk, chunk).clip(max=context)
    line = np.polynomial.Polynomial.fit(
      places, indexer, min(1, len(places) - 1)
    )
    removed = line(ends).sum() / 1e3
  return float(taken / (taken - (layers - num_full) * removed))


def write(
  folder: pathlib.Path, records: list[dict], profile: list[dict]
) -> None:
  """Writes inference.md and inference.png."""
  tables = f"{table(records, profile)}\n\n{indexer_table(records)}\n"
  common.write_text(folder / "inference.md", tables)
  plots.inference(
    folder / "inference.png",
    {phase: times(records, phase) for phase in _UNITS},
  )
