# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ways to choose which layers share, behind one small interface.

A method is a function from a problem and the wanted numbers of full layers to
a result for each. Whatever takes a method takes any function of that kind:

  def first_layers(problem, num_fulls):
    return {
      n: MethodResult(ReuseSchedule("F" * n + "S" * (problem.num_layers - n)))
      for n in num_fulls
    }
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from indexcache_jax import dynamic_programming as dynamic_programming_lib
from indexcache_jax import schedule as schedule_lib
from indexcache_jax import search as search_lib
from indexcache_jax import search_state

ReuseSchedule = schedule_lib.ReuseSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchProblem:
  """What methods may use.

  Attributes:
    loss_fn: loss of a schedule on the calibration batches.
    num_layers: L.
    pinned: layers that stay full; layer 0 always does.
    blocks: pipeline blocks of the greedy searches, see `greedy_search`; every
      method keeps their first layers full.
    seed: of the random method.
    similarity: returns the L x L matrix of dynamic programming, row l for
      layer l under the indices of column j, see
      `analysis.attention_similarity`; called if needed.
    state: of a greedy search to resume.
    on_evaluation: of a greedy search, called after each evaluation.
  """

  loss_fn: search_lib.LossFn
  num_layers: int
  pinned: Sequence[int] = (0,)
  blocks: int | Sequence[int] | None = None
  seed: int = 0
  similarity: Callable[[], Float[np.ndarray, "L L"]] | None = None
  state: search_state.SearchState | None = None
  on_evaluation: Callable[[search_state.SearchState], None] | None = None

  @property
  def full_layers(self) -> tuple[int, ...]:
    """Layers that stay full: 0, the pinned ones and the blocks' first ones."""
    return search_state.SearchState(
      self.num_layers, 0, self.pinned, self.blocks
    ).pinned


@dataclasses.dataclass(frozen=True)
class MethodResult:
  """A method's choice for one number of full layers.

  Attributes:
    schedule: chosen. Its `num_full` can differ from the number asked for
      where a rule has no schedule of that number.
    evaluations: losses asked for up to it.
    search: the whole greedy search that it came from, or None.
  """

  schedule: ReuseSchedule
  evaluations: int = 0
  search: search_lib.SearchResult | None = None


Method = Callable[[SearchProblem, Sequence[int]], Mapping[int, MethodResult]]


def uniform(
  problem: SearchProblem, num_fulls: Sequence[int]
) -> dict[int, MethodResult]:
  """The paper's rule, full at 0, n, 2n, ..., with n = ceil(L / num_full).

  Where no n gives `num_full` full layers, they are spread evenly, full at
  `floor(i L / num_full)`. With pinned layers off the grid: the finest grid
  that leaves room for them, then the longest runs of shared layers halved.
  """
  _check(problem, num_fulls)
  results = {}
  for num_full in num_fulls:
    grids = [
      {*_uniform_layers(problem.num_layers, size), *problem.full_layers}
      for size in range(num_full, 0, -1)
    ]
    # A coarser grid can meet the pins and so hold more layers.
    best = max((g for g in grids if len(g) <= num_full), key=len)
    _halve_longest_runs(best, problem.num_layers, num_full)
    results[num_full] = MethodResult(_schedule(problem, best))
  return results


def uniform_freq(
  problem: SearchProblem, num_fulls: Sequence[int]
) -> dict[int, MethodResult]:
  """The engines' rule, `index_topk_freq` = ceil(L / num_full) with offset 2.

  What one types into an engine for the same retention. Full at 0, 1, 1 + freq,
  1 + 2 freq, ...: mostly one full layer more than asked for, as layers 0 and 1
  both are; compare at the schedule's own `num_full`. Pinned layers come on
  top.
  """
  _check(problem, num_fulls)
  results = {}
  for num_full in num_fulls:
    freq = -(-problem.num_layers // num_full)
    rule = ReuseSchedule.from_freq(problem.num_layers, freq)
    layers = {*rule.full_layers, *problem.full_layers}
    results[num_full] = MethodResult(_schedule(problem, layers))
  return results


def random(
  problem: SearchProblem, num_fulls: Sequence[int]
) -> dict[int, MethodResult]:
  """Shares layers in an order drawn with `problem.seed`; asks for no loss.

  Nested like a search: one order serves every number. For several draws vary
  the seed: `dataclasses.replace(problem, seed=1)`.
  """
  _check(problem, num_fulls)
  pinned = problem.full_layers
  free = [n for n in range(problem.num_layers) if n not in pinned]
  order = np.random.default_rng(problem.seed).permutation(free).tolist()
  return {
    num_full: MethodResult(
      _schedule(problem, {*pinned, *order[: num_full - len(pinned)]})
    )
    for num_full in num_fulls
  }


def greedy(
  problem: SearchProblem, num_fulls: Sequence[int], *, lazy: bool = False
) -> dict[int, MethodResult]:
  """One greedy search, to the fewest full layers; see `greedy_search`."""
  _check(problem, num_fulls)
  result = search_lib.greedy_search(
    problem.loss_fn,
    num_layers=problem.num_layers,
    num_shared=problem.num_layers - min(num_fulls),
    pinned=problem.pinned,
    lazy=lazy,
    blocks=problem.blocks,
    state=problem.state,
    on_evaluation=problem.on_evaluation,
  )
  evaluations = [0, *(step.evaluations for step in result.trace)]
  return {
    num_full: MethodResult(
      result.schedule_at(num_full),
      evaluations[problem.num_layers - num_full],
      result,
    )
    for num_full in num_fulls
  }


def greedy_lazy(
  problem: SearchProblem, num_fulls: Sequence[int]
) -> dict[int, MethodResult]:
  """`greedy` with stale costs for bounds: fewer evaluations, maybe inexact."""
  return greedy(problem, num_fulls, lazy=True)


def dynamic_programming(
  problem: SearchProblem, num_fulls: Sequence[int]
) -> dict[int, MethodResult]:
  """The most similar attention outputs (appendix C); see `dp_schedule`."""
  _check(problem, num_fulls)
  if problem.similarity is None:
    raise ValueError(
      "`problem.similarity` must be given for dynamic programming: got None."
      " Pass a function that returns `analysis.attention_similarity(...)`."
    )
  similarity = problem.similarity()
  if similarity.shape != (problem.num_layers,) * 2:
    raise ValueError(
      "`problem.similarity` must return one row and column a layer: got shape"
      f" {similarity.shape} for num_layers={problem.num_layers}."
    )
  return {
    num_full: MethodResult(
      dynamic_programming_lib.dp_schedule(
        similarity, num_full, problem.full_layers
      )
    )
    for num_full in num_fulls
  }


METHODS: Mapping[str, Method] = {
  "uniform": uniform,
  "uniform_freq": uniform_freq,
  "random": random,
  "greedy": greedy,
  "greedy_lazy": greedy_lazy,
  "dynamic_programming": dynamic_programming,
}


def _uniform_layers(num_layers, num_full):
  every = -(-num_layers // num_full)
  layers = range(0, num_layers, every)
  if len(layers) == num_full:
    return layers
  return [number * num_layers // num_full for number in range(num_full)]


def _halve_longest_runs(layers, num_layers, num_full):
  while len(layers) < num_full:
    starts = sorted(layers)
    sizes = np.diff([*starts, num_layers])
    longest = int(np.argmax(sizes))
    layers.add(starts[longest] + int(sizes[longest]) // 2)


def _schedule(problem, layers):
  return ReuseSchedule(
    "".join("SF"[layer in layers] for layer in range(problem.num_layers))
  )


def _check(problem, num_fulls):
  if not num_fulls:
    raise ValueError(
      "`num_fulls` must name at least one number of full layers: got none."
    )
  for num_full in num_fulls:
    dynamic_programming_lib.check_num_full(
      problem.num_layers, num_full, problem.full_layers
    )
