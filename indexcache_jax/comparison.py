# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Methods against each other: what each schedule costs on held-out text."""

import dataclasses
import fractions
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from indexcache_jax import methods as methods_lib
from indexcache_jax import schedule as schedule_lib
from indexcache_jax import search as search_lib

ReuseSchedule = schedule_lib.ReuseSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedSchedule:
  """One method's schedule at one retention.

  Attributes:
    method: name.
    retention: share of the layers that was asked to stay full.
    schedule: the method's; its `num_full` can differ where a rule has no
      schedule of that number.
    loss: of it on held-out text, in nats a token.
    loss_delta: against all full.
    evaluations: calibration losses that the method asked for up to it.
    search: the greedy search that it came from, or None.
  """

  method: str
  retention: fractions.Fraction
  schedule: ReuseSchedule
  loss: float
  loss_delta: float
  evaluations: int
  search: search_lib.SearchResult | None


def num_full_layers(retention: fractions.Fraction, num_layers: int) -> int:
  """Full layers at a retention: `ceil(L retention)`, as uniform rules have it.

  The paper's 47 layers keep 24 at 1/2 and 12 at 1/4.
  """
  if not 0 < retention <= 1:
    raise ValueError(
      "`retention` must be a share of the layers above 0, at most 1: got"
      f" {retention}. 1/4 keeps every fourth indexer."
    )
  return math.ceil(num_layers * retention)


def compare(
  methods: Mapping[str, methods_lib.Method],
  problems: Callable[[str], methods_lib.SearchProblem],
  retentions: Sequence[fractions.Fraction],
  held_out_loss: search_lib.LossFn,
) -> Iterator[ComparedSchedule]:
  """Runs methods and yields their schedules, each with its held-out loss.

  Args:
    methods: by name, see `methods`.
    problems: returns the problem that a method is to solve, by its name.
    retentions: shares of the layers that stay full.
    held_out_loss: of a schedule, on text that no method sees; asked for all
      full first and once for each distinct pattern.

  Yields:
    A schedule for each method and retention, methods in order.
  """
  losses: dict[str, float] = {}

  def loss_of(schedule):
    if schedule.pattern not in losses:
      losses[schedule.pattern] = held_out_loss(schedule)
    return losses[schedule.pattern]

  for name, method in methods.items():
    problem = problems(name)
    num_layers = problem.num_layers
    baseline = loss_of(ReuseSchedule.all_full(num_layers))
    wanted = {r: num_full_layers(r, num_layers) for r in retentions}
    results = method(problem, sorted(set(wanted.values()), reverse=True))
    for retention, num_full in wanted.items():
      result = results[num_full]
      loss = loss_of(result.schedule)
      yield ComparedSchedule(
        method=name,
        retention=retention,
        schedule=result.schedule,
        loss=loss,
        loss_delta=loss - baseline,
        evaluations=result.evaluations,
        search=result.search,
      )


def recommend(
  rows: Sequence[ComparedSchedule], *, max_loss_increase: float
) -> tuple[ComparedSchedule, bool]:
  """Chooses the schedule to serve.

  Args:
    rows: of one comparison, at least one.
    max_loss_increase: tolerated, as a share of the loss of all full.

  Returns:
    The row of fewest full layers, then of least loss, among those within the
    tolerance, and True; if there is none, the row of least loss and False.
  """
  within = [
    row
    for row in rows
    if row.loss_delta <= max_loss_increase * (row.loss - row.loss_delta)
  ]
  if within:
    return min(within, key=lambda r: (r.schedule.num_full, r.loss)), True
  return min(rows, key=lambda row: row.loss), False
