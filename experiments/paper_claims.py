# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether the paper's claims hold in its tables, by rules stated beforehand.

A schedule *loses* against another if its mean accuracy is lower by more than
`MARGIN` in the mean over seeds, and lower in every seed. It is *as good* if it
is not lower by more than the margin in the mean. Anything else is undecided.
"""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import common, paper_recipe

# Of accuracy, from 0 to 1: two answers of a hundred.
MARGIN = 0.02
# Share of a layer's keys from which on layers "share most" of them.
_MOST = 0.5
_NEEDED = ("overlap", "training_free", "training_aware")

# The content of a table's .json file.
Table = Mapping[str, Any]


class Finding(NamedTuple):
  """One claim and what became of it.

  Attributes:
    claim: the paper's.
    rule: by which it holds here.
    figures: that decide.
    verdict: "holds", "does not hold" or "undecided".
  """

  claim: str
  rule: str
  figures: str
  verdict: str


def write(folder: pathlib.Path) -> str | None:
  """Writes claims.md from the tables of a folder; None if one is missing."""
  paths = [folder / f"{name}.json" for name in _NEEDED]
  if not all(path.exists() for path in paths):
    return None
  tables = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
  page = markdown(findings(*tables), [table["seeds"] for table in tables])
  common.write_text(folder / "claims.md", page)
  return page


def findings(overlap: Table, free: Table, aware: Table) -> list[Finding]:
  """Decides each claim.

  Args:
    overlap: table 1.
    free: table 2, schedules without training.
    aware: table 3, schedules trained with. A claim about a row that was not
      trained is left out.
  """
  found = [
    _adjacent(overlap),
    _comparison(
      "Without training, a uniform 1/4 loses.",
      _accuracies(free, "uniform 1/4"),
      _accuracies(free, paper_recipe.FULL),
      wanted="loses",
    ),
    _comparison(
      "Without training, a searched 1/4 does not.",
      _accuracies(free, "searched 1/4"),
      _accuracies(free, paper_recipe.FULL),
      wanted="as good",
    ),
    _comparison(
      "1/8 loses even when it is searched.",
      _accuracies(free, "searched 1/8"),
      _accuracies(free, paper_recipe.FULL),
      wanted="loses",
    ),
    _comparison(
      "Overlap alone is a bad guide: chosen by it, 1/4 loses against the"
      " searched one.",
      _accuracies(free, "by overlap 1/4"),
      _accuracies(free, "searched 1/4"),
      wanted="loses",
    ),
  ]
  for retention in ("1/2", "1/4"):
    multi, own = (
      f"uniform {retention}, {loss}" for loss in ("multi-layer", "own layer")
    )
    pairs = (
      (
        f"Trained with the multi-layer loss, a uniform {retention} is as good"
        " as all full.",
        multi,
        paper_recipe.FULL,
        "as good",
      ),
      (
        f"With the loss of its own layers alone, a uniform {retention} loses"
        " against that.",
        own,
        multi,
        "loses",
      ),
    )
    found += [
      _comparison(
        claim, _accuracies(aware, one), _accuracies(aware, other), wanted=wanted
      )
      for claim, one, other, wanted in pairs
      if {one, other} <= set(aware["rows"])
    ]
  return found


def markdown(found: Sequence[Finding], seeds: Sequence[Sequence[int]]) -> str:
  """The page."""
  distinct = sorted({seed for group in seeds for seed in group})
  lines = [
    "# The paper's claims, by rules stated beforehand",
    "",
    f"Mean accuracy is over all tasks, lengths and depths; the margin is"
    f" {MARGIN:g} of it. Seeds: {', '.join(map(str, distinct))}. Figures: both"
    " means, then the difference of each seed.",
    "",
    "| claim | holds here if | figures | verdict |",
    "|---|---|---|---|",
    *(f"| {' | '.join(finding)} |" for finding in found),
  ]
  return "\n".join(lines) + "\n"


def _adjacent(overlap):
  shares = overlap["adjacent"]["values"]
  mean = statistics.fmean(shares)
  return Finding(
    "Adjacent layers share most of their indices.",
    f"the mean overlap is above {_MOST:g} in every seed",
    f"{mean:.2f}; {_list(shares)}",
    _verdict(min(shares) > _MOST, max(shares) <= _MOST),
  )


def _comparison(claim, values, others, *, wanted):
  """A claim that one schedule loses against another, or is as good."""
  changes = [a - b for a, b in zip(values, others, strict=True)]
  mean = statistics.fmean(changes)
  loses = mean < -MARGIN and max(changes) < 0
  is_as_good = mean >= -MARGIN
  holds, fails = (
    (loses, is_as_good)
    if wanted == "loses"
    else (
      is_as_good,
      loses,
    )
  )
  rule = {
    "loses": "lower by more than the margin, and in every seed",
    "as good": "not lower by more than the margin",
  }[wanted]
  return Finding(
    claim,
    rule,
    f"{statistics.fmean(values):.3f} against {statistics.fmean(others):.3f};"
    f" {_list(changes, sign='+')}",
    _verdict(holds, fails),
  )


def _accuracies(table, row):
  """Of each seed."""
  return table["rows"][row]["accuracy"]["values"]


def _verdict(holds, fails):
  if holds:
    return "holds"
  return "does not hold" if fails else "undecided"


def _list(values, sign=""):
  return ", ".join(f"{value:{sign}.3f}" for value in values)
