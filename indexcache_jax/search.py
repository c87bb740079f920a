# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Greedy search for the layers whose selection can be shared.

Algorithm 1 of IndexCache (arXiv 2603.12201, section 3.2): from all full, flip
the layer whose flip costs the least loss, until as many are shared as asked.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from indexcache_jax import schedule as schedule_lib
from indexcache_jax import search_state

ReuseSchedule = schedule_lib.ReuseSchedule
SearchState = search_state.SearchState
LossFn = Callable[[ReuseSchedule], float]

# Relative; far above the rounding of a stale bound, far below any real cost.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class SearchStep:
  """One flip.

  Attributes:
    layer: turned from full to shared.
    loss: of the schedule after it.
    pattern: that schedule's.
    evaluations: losses asked for so far.
  """

  layer: int
  loss: float
  pattern: str
  evaluations: int


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """A search, whole.

  Attributes:
    schedule: with as many shared layers as asked.
    trace: the flips in order.
    losses: loss of every evaluated pattern, in order of evaluation.
    evaluations: losses asked for, those known from a state included.
  """

  schedule: ReuseSchedule
  trace: tuple[SearchStep, ...]
  losses: Mapping[str, float]
  evaluations: int

  @property
  def baseline_loss(self) -> float | None:
    """Loss of all full; None if not asked for, as only a lazy search does."""
    return self.losses.get("F" * self.schedule.num_layers)

  @property
  def layer_forwards(self) -> int:
    """Layers run if the activations below a flip are kept, a pass over each.

    What `LayerwiseLoss.layer_forwards` counts; without kept activations it is
    `evaluations * num_layers`, and the paper's full sweep, N (N - 1) / 2
    forwards, is `N * N * (N - 1) / 2` of a model of N layers.
    """
    if not self.losses:
      return 0
    num_layers = self.schedule.num_layers
    bases = ["F" * num_layers, *(step.pattern for step in self.trace)]
    total = num_layers + sum(num_layers - s.layer for s in self.trace[:-1])
    for pattern in self.losses:
      if "S" in pattern:
        base = bases[pattern.count("S") - 1]
        total += num_layers - _first_difference(base, pattern)
    return total

  def schedule_at(self, num_full: int) -> ReuseSchedule:
    """Returns the schedule of an earlier step: one search, every retention.

    Args:
      num_full: full layers wanted, from those of `schedule` to all.
    """
    num_layers = self.schedule.num_layers
    fewest = num_layers - len(self.trace)
    if not fewest <= num_full <= num_layers:
      raise ValueError(
        f"`num_full` must be from {fewest}, where this search ended, to"
        f" {num_layers}: got {num_full}. Search with a larger `num_shared`; a"
        " saved state is extended."
      )
    if num_full == num_layers:
      return ReuseSchedule.all_full(num_layers)
    return ReuseSchedule(self.trace[num_layers - num_full - 1].pattern)


def greedy_search(
  loss_fn: LossFn,
  *,
  num_layers: int,
  num_shared: int,
  pinned: Sequence[int] = (0,),
  lazy: bool = False,
  blocks: int | Sequence[int] | None = None,
  state: SearchState | None = None,
  on_evaluation: Callable[[SearchState], None] | None = None,
) -> SearchResult:
  """Flips the cheapest layer until `num_shared` are shared.

  The paper's Algorithm 1: each step evaluates the flip of every remaining
  layer on the same calibration batches and commits the one of least loss; of
  equal losses, the lower layer. A full sweep takes N (N - 1) / 2 evaluations.

  The evaluations of a step share all activations below their flips: if
  `loss_fn` has `set_base` (see `LayerwiseLoss`), it is called with each
  committed schedule that candidates will be compared on.

  Args:
    loss_fn: loss of a schedule; the same one for the same schedule.
    num_layers: L.
    num_shared: layers to share in the end.
    pinned: layers that stay full, such as pipeline-stage starts; layer 0
      always does.
    lazy: re-evaluate only flips that can still win, taking the last known
      increase in loss of each flip for a lower bound. Same trace if increases
      only grow as layers are shared; a heuristic otherwise. Asks for the loss
      of all full, too.
    blocks: the paper's pipeline variant: a number of blocks, or their first
      layers, which stay full. Blocks take turns to flip a layer of their own,
      so a flip compares the layers of one block only: about as many times
      fewer evaluations as there are blocks.
    state: of a search that was stopped; it goes on to the identical result.
    on_evaluation: called with the state after every evaluation, to save it
      and to show progress (`evaluations` of `evaluations_bound`). Not called
      for losses known from `state`.

  Returns:
    The schedule, the trace, from which `schedule_at` takes every higher
    retention, and all losses.

  Raises:
    ValueError: for impossible settings, a state of other settings, or a loss
      that is not finite.
  """
  settings = SearchState(num_layers, num_shared, pinned, blocks, lazy)
  if state is not None:
    state.check_resumes(settings)
    settings = dataclasses.replace(settings, losses=dict(state.losses))
  evaluate = _Evaluator(loss_fn, settings, on_evaluation)
  base = ReuseSchedule.all_full(num_layers)
  base_loss = evaluate(base, base) if lazy and num_shared else 0.0
  costs, trace = {}, []
  for block, _ in settings.rounds():
    candidates = [
      layer
      for layer in block
      if base.is_full(layer) and layer not in settings.pinned
    ]
    losses = _flip_losses(evaluate, base, base_loss, candidates, costs)
    if lazy:
      costs |= {layer: loss - base_loss for layer, loss in losses.items()}
    base_loss, layer = min((loss, layer) for layer, loss in losses.items())
    base = base.flip(layer)
    trace.append(
      SearchStep(layer, base_loss, base.pattern, evaluate.evaluations)
    )
  return SearchResult(base, tuple(trace), evaluate.used, evaluate.evaluations)


def _flip_losses(
  evaluate: "_Evaluator",
  base: ReuseSchedule,
  base_loss: float,
  candidates: Iterable[int],
  costs: Mapping[int, float],
) -> dict[int, float]:
  """Losses of the flips that can be the cheapest; all, if no cost is known."""

  def bound(layer):
    return base_loss + costs.get(layer, -math.inf)

  losses, least = {}, math.inf
  for layer in sorted(candidates, key=lambda layer: (bound(layer), layer)):
    # An equal bound is evaluated: the lower layer may tie, and it would win.
    slack = _ROUNDING * (abs(base_loss) + abs(least)) if losses else 0.0
    if bound(layer) > least + slack:
      break
    losses[layer] = evaluate(base, base.flip(layer))
    least = min(least, losses[layer])
  return losses


class _Evaluator:
  """Losses by calling `loss_fn`, or from a state where it knows them.

  Attributes:
    evaluations: losses asked for.
    used: those losses.
  """

  def __init__(self, loss_fn, settings, on_evaluation):
    self.evaluations = 0
    self.used = {}
    self._loss_fn = loss_fn
    self._settings = settings
    self._on_evaluation = on_evaluation
    self._base = None

  def __call__(self, base: ReuseSchedule, schedule: ReuseSchedule) -> float:
    self.evaluations += 1
    known = self._settings.losses.get(schedule.pattern)
    if known is not None:
      self.used[schedule.pattern] = known
      return known
    # Only now, so that replaying a state runs no layer.
    if base != self._base and hasattr(self._loss_fn, "set_base"):
      self._loss_fn.set_base(base)
    self._base = base
    loss = float(self._loss_fn(schedule))
    if not math.isfinite(loss):
      raise ValueError(
        f"`loss_fn` must return a finite loss: got {loss} for the schedule"
        f" {schedule.pattern!r}. Check the model's activations under it."
      )
    self.used[schedule.pattern] = loss
    if self._on_evaluation is not None:
      losses = {**self._settings.losses, **self.used}
      self._on_evaluation(dataclasses.replace(self._settings, losses=losses))
    return loss


def _first_difference(a: str, b: str) -> int:
  return next(
    n for n, pair in enumerate(zip(a, b, strict=True)) if len({*pair}) > 1
  )
