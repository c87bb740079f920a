# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether the paper's claims hold in its tables, by rules stated beforehand.

A schedule *loses* against another if its mean accuracy is lower by more than
`MARGIN` in the mean over seeds, and lower in every seed. It is *as good* if it
is not lower by more than the margin in the mean. Anything else is undecided.

A task that no model learned adds noise to every mean, enough to turn a sign
that the rules ask for. So each verdict stands beside the one without such
tasks, a column that was added when the first tables were known.
"""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import common, paper_recipe

# Of accuracy, from 0 to 1: two answers of a hundred.
MARGIN = 0.02
# Mean accuracy of all full from which on a task counts as learned.
_LEARNED = 0.5
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
    learned_figures: of the learned tasks alone; empty where no task decides.
    learned_verdict: by these.
  """

  claim: str
  rule: str
  figures: str
  verdict: str
  learned_figures: str = ""
  learned_verdict: str = ""


def write(folder: pathlib.Path) -> str | None:
  """Writes claims.md from the tables of a folder; None if one is missing."""
  paths = [folder / f"{name}.json" for name in _NEEDED]
  if not all(path.exists() for path in paths):
    return None
  tables = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
  page = markdown(
    findings(*tables),
    [table["seeds"] for table in tables],
    sorted(_tasks(tables[1]) - learned_tasks(tables[1])),
  )
  common.write_text(folder / "claims.md", page)
  return page


def learned_tasks(free: Table) -> set[str]:
  """Tasks that all full answers in at least half of all cases, in table 2."""
  return {
    task
    for task in _tasks(free)
    if statistics.fmean(_accuracies(free, paper_recipe.FULL, {task}))
    >= _LEARNED
  }


def findings(overlap: Table, free: Table, aware: Table) -> list[Finding]:
  """Decides each claim.

  Args:
    overlap: table 1.
    free: table 2, schedules without training.
    aware: table 3, schedules trained with. A claim about a row that was not
      trained is left out.
  """
  learned = learned_tasks(free)
  full = paper_recipe.FULL
  found = [
    _adjacent(overlap),
    *(
      _comparison(claim, free, one, other, wanted, learned)
      for claim, one, other, wanted in (
        (
          "Without training, a uniform 1/4 loses.",
          "uniform 1/4",
          full,
          "loses",
        ),
        (
          "Without training, a searched 1/4 does not.",
          "searched 1/4",
          full,
          "as good",
        ),
        (
          "1/8 loses even when it is searched.",
          "searched 1/8",
          full,
          "loses",
        ),
        (
          "Overlap alone is a bad guide: chosen by it, 1/4 loses against the"
          " searched one.",
          "by overlap 1/4",
          "searched 1/4",
          "loses",
        ),
      )
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
        full,
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
      _comparison(claim, aware, one, other, wanted, learned)
      for claim, one, other, wanted in pairs
      if {one, other} <= set(aware["rows"])
    ]
  return found


def markdown(
  found: Sequence[Finding], seeds: Sequence[Sequence[int]], left_out: list[str]
) -> str:
  """The page.

  Args:
    found: of `findings`.
    seeds: of each table.
    left_out: tasks that were not learned.
  """
  distinct = sorted({seed for group in seeds for seed in group})
  without = f"without {', '.join(left_out)}" if left_out else "learned tasks"
  lines = [
    "# The paper's claims, by rules stated beforehand",
    "",
    f"Mean accuracy is over all tasks, lengths and depths; the margin is"
    f" {MARGIN:g} of it. Seeds: {', '.join(map(str, distinct))}. Figures: both"
    " means, then the difference of each seed. The last two columns, added"
    " afterwards, leave out tasks that all full answers in less than half of"
    f" all cases: {', '.join(left_out) or 'none'}.",
    "",
    common.markdown_table(
      ("claim", "holds here if", "figures", "verdict", without, "verdict"),
      found,
    ),
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


def _comparison(claim, table, one, other, wanted, learned):
  """A claim that one schedule loses against another, or is as good."""
  rule = {
    "loses": "lower by more than the margin, and in every seed",
    "as good": "not lower by more than the margin",
  }[wanted]
  compared = [
    text
    for tasks in (_tasks(table), learned)
    if tasks
    for text in _compared(
      _accuracies(table, one, tasks), _accuracies(table, other, tasks), wanted
    )
  ]
  return Finding(claim, rule, *compared)


def _compared(values, others, wanted):
  """Figures and verdict of two schedules, by the accuracies of each seed."""
  changes = [a - b for a, b in zip(values, others, strict=True)]
  mean = statistics.fmean(changes)
  loses = mean < -MARGIN and max(changes) < 0
  is_as_good = mean >= -MARGIN
  found = (loses, is_as_good) if wanted == "loses" else (is_as_good, loses)
  figures = (
    f"{statistics.fmean(values):.3f} against {statistics.fmean(others):.3f};"
    f" {_list(changes, sign='+')}"
  )
  return figures, _verdict(*found)


def _accuracies(table, row, tasks):
  """Of each seed, over these tasks and all lengths."""
  by_task = table["rows"][row]["tasks"]
  cells = [
    summary["values"]
    for task, by_length in by_task.items()
    if task in tasks
    for summary in by_length.values()
  ]
  return [statistics.fmean(values) for values in zip(*cells, strict=True)]


def _tasks(table):
  return set(table["rows"][paper_recipe.FULL]["tasks"])


def _verdict(holds, fails):
  if holds:
    return "holds"
  return "does not hold" if fails else "undecided"


def _list(values, sign=""):
  return ", ".join(f"{value:{sign}.3f}" for value in values)
