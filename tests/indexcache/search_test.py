# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import itertools
import json

import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import search, search_state
from tests.indexcache import toy

LAYERS = 7


class Table:
  """A loss of every pattern, counting calls."""

  def __init__(self, losses):
    self.losses = losses
    self.calls = []

  def __call__(self, schedule):
    self.calls.append(schedule.pattern)
    return self.losses[schedule.pattern]


def patterns(num_layers):
  return [
    "F" + "".join(p) for p in itertools.product("FS", repeat=num_layers - 1)
  ]


def random_table(seed, num_layers=LAYERS, integers=False):
  rng = np.random.default_rng(seed)
  draw = (lambda: float(rng.integers(4))) if integers else rng.normal
  return Table({pattern: draw() for pattern in patterns(num_layers)})


def growing_table(seed, num_layers=LAYERS, integers=False):
  """Costs of a flip that only grow as other layers are shared."""
  rng = np.random.default_rng(seed)
  alone = rng.normal(size=num_layers)
  pairs = rng.exponential(size=(num_layers, num_layers)) / num_layers
  if integers:
    alone = rng.integers(-1, 3, num_layers)
    pairs = rng.integers(0, 2, (num_layers, num_layers))
  losses = {}
  for pattern in patterns(num_layers):
    shared = np.array([letter == "S" for letter in pattern], float)
    losses[pattern] = float(shared @ alone + shared @ pairs @ shared)
  return Table(losses)


def brute_force(losses, num_layers, num_shared, pinned=(), blocks=None):
  """Algorithm 1 on sets; blocks as lists of layers, in turn."""
  blocks = blocks or [range(num_layers)]
  shared, trace, evaluations = set(), [], 0

  def pattern(layers):
    return "".join("FS"[layer in layers] for layer in range(num_layers))

  while len(trace) < num_shared:
    for block in blocks:
      rest = [n for n in block if n not in shared and n not in (0, *pinned)]
      if not rest or len(trace) == num_shared:
        continue
      best = None
      for layer in rest:
        loss = losses[pattern(shared | {layer})]
        evaluations += 1
        if best is None or loss < best[0]:
          best = (loss, layer)
      shared.add(best[1])
      trace.append((best[1], best[0], pattern(shared), evaluations))
  return trace


def records(result, with_evaluations=True):
  steps = [(s.layer, s.loss, s.pattern, s.evaluations) for s in result.trace]
  return steps if with_evaluations else [step[:3] for step in steps]


class GreedySearchTest(parameterized.TestCase):
  def test_hand_written_trace(self):
    # Layer 2 is free, 3 costs 1, 1 costs 2; 3 becomes dear once 2 is shared.
    table = Table(
      {
        "FSFF": 2.0, "FFSF": 0.0, "FFFS": 1.0,
        "FSSF": 2.5, "FFSS": 6.0,
        "FSSS": 9.0,
      }
    )  # fmt: skip
    result = ic.greedy_search(table, num_layers=4, num_shared=3)
    self.assertEqual(
      records(result),
      [(2, 0.0, "FFSF", 3), (1, 2.5, "FSSF", 5), (3, 9.0, "FSSS", 6)],
    )
    self.assertEqual(result.schedule.pattern, "FSSS")
    self.assertEqual(table.calls, list(table.losses))

  @parameterized.product(seed=list(range(20)), integers=(False, True))
  def test_equals_brute_force(self, seed, integers):
    table = random_table(seed, integers=integers)
    for pinned, num_shared in (((0,), 6), ((0,), 3), ((0, 4), 5), ((2, 6), 4)):
      result = ic.greedy_search(
        table, num_layers=LAYERS, num_shared=num_shared, pinned=pinned
      )
      self.assertEqual(
        records(result), brute_force(table.losses, LAYERS, num_shared, pinned)
      )

  def test_all_losses_equal_flip_in_order_of_layers(self):
    result = ic.greedy_search(lambda _: 1.0, num_layers=5, num_shared=4)
    self.assertEqual([step.layer for step in result.trace], [1, 2, 3, 4])

  def test_a_full_sweep_takes_the_papers_number_of_evaluations(self):
    result = ic.greedy_search(
      lambda s: float(s.num_shared), num_layers=47, num_shared=46
    )
    self.assertEqual(result.evaluations, 1081)
    self.assertLen(result.losses, 1081)

  @parameterized.parameters(1, 2, 3, 7)
  def test_blocks_equal_brute_force(self, num_blocks):
    split = [
      list(map(int, b)) for b in np.array_split(range(LAYERS), num_blocks)
    ]
    starts = [block[0] for block in split]
    for seed, integers in itertools.product(range(10), (False, True)):
      table = random_table(seed, integers=integers)
      num_shared = LAYERS - len({*starts, 5})
      expected = brute_force(
        table.losses, LAYERS, num_shared, (5, *starts), split
      )
      for blocks in (num_blocks, starts):
        result = ic.greedy_search(
          table,
          num_layers=LAYERS,
          num_shared=num_shared,
          pinned=(5,),
          blocks=blocks,
        )
        self.assertEqual(records(result), expected)
        self.assertTrue(all(result.schedule.is_full(n) for n in (5, *starts)))

  def test_blocks_divide_the_evaluations(self):
    def evaluations(blocks):
      return ic.greedy_search(
        lambda s: float(s.num_shared),
        num_layers=64,
        num_shared=60,
        blocks=blocks,
      ).evaluations

    self.assertLess(evaluations(4), evaluations(None) / 3.5)

  def test_earlier_steps_serve_every_retention(self):
    table = random_table(1)
    result = ic.greedy_search(table, num_layers=LAYERS, num_shared=5)
    self.assertEqual(result.schedule_at(LAYERS).pattern, "F" * LAYERS)
    for num_full in range(2, LAYERS):
      shorter = ic.greedy_search(
        table, num_layers=LAYERS, num_shared=LAYERS - num_full
      )
      self.assertEqual(result.schedule_at(num_full), shorter.schedule)

  def test_schedule_beyond_the_search(self):
    result = ic.greedy_search(random_table(1), num_layers=LAYERS, num_shared=3)
    with self.assertRaisesRegex(ValueError, "from 4, where .* to 7: got 3"):
      result.schedule_at(3)

  def test_nothing_to_share(self):
    result = ic.greedy_search(random_table(1), num_layers=3, num_shared=0)
    self.assertEqual(result.schedule.pattern, "FFF")
    self.assertEqual((result.trace, result.layer_forwards), ((), 0))

  @parameterized.parameters(
    ({"num_layers": 0, "num_shared": 0}, "`num_layers`.* at least 1: got 0"),
    ({"num_layers": 4, "num_shared": 4}, "from 0 to 3.*got 4 .*pinned=.0,"),
    ({"num_layers": 4, "num_shared": -1}, "from 0 to 3.*got -1"),
    (
      {"num_layers": 4, "num_shared": 3, "pinned": (0, 2)},
      r"from 0 to 2.*pinned=\(0, 2\)",
    ),
    (
      {"num_layers": 4, "num_shared": 1, "pinned": (0, 4, -1)},
      r"from 0 to 3: got \[-1, 4\]",
    ),
    ({"num_layers": 4, "num_shared": 1, "blocks": 5}, "1 to num_layers.*got 5"),
    ({"num_layers": 4, "num_shared": 1, "blocks": 0}, "1 to num_layers.*got 0"),
    ({"num_layers": 4, "num_shared": 1, "blocks": (1, 2)}, r"from 0.*\(1, 2\)"),
    ({"num_layers": 4, "num_shared": 1, "blocks": (0, 2, 2)}, "ascending"),
    ({"num_layers": 4, "num_shared": 1, "blocks": (0, 4)}, "below num_layers"),
    ({"num_layers": 4, "num_shared": 1, "blocks": ()}, "ascending"),
  )
  def test_impossible_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      ic.greedy_search(lambda _: 0.0, **settings)

  @parameterized.parameters(float("nan"), float("inf"))
  def test_a_loss_that_is_no_number(self, value):
    def loss_fn(schedule):
      return value if schedule.pattern == "FSSF" else 0.0

    with self.assertRaisesRegex(ValueError, f"got {value}.*'FSSF'"):
      ic.greedy_search(loss_fn, num_layers=4, num_shared=2)


class LazySearchTest(parameterized.TestCase):
  @parameterized.product(
    seed=list(range(20)), integers=(False, True), blocks=(None, 2)
  )
  def test_exact_where_costs_only_grow(self, seed, integers, blocks):
    table = growing_table(seed, integers=integers)
    settings = {
      "num_layers": LAYERS,
      "num_shared": LAYERS - 1 - (blocks == 2),
      "blocks": blocks,
    }
    exact = ic.greedy_search(table, **settings)
    lazy = ic.greedy_search(table, **settings, lazy=True)
    self.assertEqual(records(lazy, False), records(exact, False))
    self.assertEqual(lazy.baseline_loss, table.losses["F" * LAYERS])
    self.assertIsNone(exact.baseline_loss)
    if blocks is None and not integers:  # Ties are all evaluated.
      self.assertLess(lazy.evaluations, exact.evaluations)

  def test_takes_far_fewer_evaluations_of_independent_layers(self):
    cost = np.random.default_rng(0).normal(size=40)

    def loss_fn(schedule):
      return float(
        sum(c for c, s in zip(cost, schedule.pattern, strict=True) if s == "S")
      )

    settings = {"num_layers": 40, "num_shared": 39}
    exact = ic.greedy_search(loss_fn, **settings)
    lazy = ic.greedy_search(loss_fn, **settings, lazy=True)
    self.assertEqual(
      [step.layer for step in lazy.trace], [step.layer for step in exact.trace]
    )
    self.assertEqual(exact.evaluations, 780)
    # Baseline, a first sweep, then one a step.
    self.assertEqual(lazy.evaluations, 1 + 39 + 38)

  def test_differs_where_a_cost_shrinks(self):
    # Sharing 1 makes 3 free, which its stale cost of 5 hides.
    table = Table(
      {
        "FFFF": 0.0,
        "FSFF": 1.0, "FFSF": 2.0, "FFFS": 5.0,
        "FSSF": 3.0, "FSFS": 1.0,
      }
    )  # fmt: skip
    exact = ic.greedy_search(table, num_layers=4, num_shared=2)
    lazy = ic.greedy_search(table, num_layers=4, num_shared=2, lazy=True)
    self.assertEqual(exact.schedule.pattern, "FSFS")
    self.assertEqual(lazy.schedule.pattern, "FSSF")


class ResumeTest(parameterized.TestCase):
  @parameterized.product(lazy=(False, True), blocks=(None, 2))
  def test_identical_after_a_stop_at_every_evaluation(self, lazy, blocks):
    settings = {
      "num_layers": 6,
      "num_shared": 4,
      "lazy": lazy,
      "blocks": blocks,
    }
    saved = []
    table = random_table(3, num_layers=6)
    expected = ic.greedy_search(
      table, **settings, on_evaluation=lambda s: saved.append(s.to_json())
    )
    self.assertLen(saved, expected.evaluations)
    for number, text in enumerate(saved, start=1):
      state = ic.SearchState.from_json(text)
      self.assertEqual(state.evaluations, number)
      table.calls.clear()
      states = []
      result = ic.greedy_search(
        table, **settings, state=state, on_evaluation=states.append
      )
      self.assertEqual(result, expected)
      self.assertLen(table.calls, expected.evaluations - number)
      if states:
        self.assertEqual(states[-1].to_json(), saved[-1])

  @parameterized.parameters(False, True)
  def test_bound_of_evaluations_is_tight_at_the_end(self, lazy):
    states = []
    settings = {
      "num_layers": LAYERS,
      "num_shared": 5,
      "blocks": 2,
      "lazy": lazy,
    }
    result = ic.greedy_search(
      growing_table(2), **settings, on_evaluation=states.append
    )
    bounds = [state.evaluations_bound for state in states]
    self.assertEqual(bounds, sorted(bounds, reverse=True))
    for state in states:
      self.assertLessEqual(state.evaluations, state.evaluations_bound)
    if not lazy:
      self.assertEqual({*bounds}, {result.evaluations})
    fresh = ic.SearchState(**settings)
    self.assertEqual(fresh.evaluations_bound, bounds[0])

  def test_a_finished_search_is_extended(self):
    table, states = random_table(4), []
    ic.greedy_search(
      table, num_layers=LAYERS, num_shared=2, on_evaluation=states.append
    )
    table.calls.clear()
    longer = ic.greedy_search(
      table, num_layers=LAYERS, num_shared=5, state=states[-1]
    )
    self.assertLen(table.calls, longer.evaluations - 6 - 5)
    self.assertEqual(
      longer, ic.greedy_search(table, num_layers=LAYERS, num_shared=5)
    )

  def test_a_failing_loss_loses_nothing(self):
    table, states = random_table(5), []

    def failing(schedule):
      if len(states) == 9:
        raise RuntimeError("out of memory")
      return table(schedule)

    with self.assertRaisesRegex(RuntimeError, "out of memory"):
      ic.greedy_search(
        failing, num_layers=LAYERS, num_shared=5, on_evaluation=states.append
      )
    self.assertEqual(states[-1].evaluations, 9)

  @parameterized.parameters(
    ({"num_layers": 6}, "same num_layers: got 5 in the state, 6"),
    ({"pinned": (0, 1)}, r"same pinned: got \(0,\).*\(0, 1\)"),
    ({"lazy": True}, "same lazy: got False in the state, True"),
    ({"blocks": (0, 2)}, "same pinned"),
  )
  def test_other_settings(self, changes, message):
    settings = {"num_layers": 5, "num_shared": 2}
    with self.assertRaisesRegex(ValueError, message):
      ic.greedy_search(
        lambda _: 0.0, **(settings | changes), state=ic.SearchState(**settings)
      )

  def test_blocks_of_other_settings(self):
    state = ic.SearchState(num_layers=5, num_shared=2, pinned=(0, 2))
    with self.assertRaisesRegex(ValueError, r"same blocks: got \(0,\)"):
      state.check_resumes(
        ic.SearchState(num_layers=5, num_shared=2, blocks=(0, 2))
      )

  @parameterized.parameters(
    ("{", "must be JSON.*cut off"),
    ("[]", r"keys \['blocks', 'lazy'.*got .*list"),
    ("{}", r"keys \['blocks'.*got \[\]"),
    ({"num_layers": "4"}, "`num_layers`.*int.*'4'"),
    ({"num_layers": True}, "`num_layers`.*int.*True"),
    ({"pinned": [0, "a"]}, "`pinned`.*list"),
    ({"lazy": 1}, "`lazy`.*bool.*1"),
    ({"losses": {"FSFF": "low"}}, "`losses`.*numbers"),
    ({"losses": {"FSF": 1.0}}, "3 letters .'FSF'. for num_layers=4"),
    ({"losses": {"FSFF": float("nan")}}, "finite: got nan for 'FSFF'"),
  )
  def test_a_bad_text(self, text, message):
    if isinstance(text, dict):
      good = ic.SearchState(num_layers=4, num_shared=2).to_json()
      text = json.dumps(json.loads(good) | text)
    with self.assertRaisesRegex(ValueError, message):
      search_state.SearchState.from_json(text)


class LayerwiseSearchTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_kept_prefixes_change_nothing_and_spare_layers(self, lazy):
    batches = np.stack([toy.random_tokens(seed=seed) for seed in (3, 4)])
    loss_fn = ic.LayerwiseLoss(toy.config(), toy.full_params(), batches)
    whole = ic.LayerwiseLoss(toy.config(), toy.full_params(), batches)
    settings = {"num_layers": 4, "num_shared": 3, "lazy": lazy}
    result = ic.greedy_search(loss_fn, **settings)
    # A plain function has no `set_base`: each evaluation is a whole forward.
    expected = ic.greedy_search(lambda s: whole(s), **settings)
    self.assertEqual(result, expected)
    self.assertEqual(loss_fn.layer_forwards, result.layer_forwards)
    self.assertEqual(whole.layer_forwards, 4 * result.evaluations)
    self.assertLess(loss_fn.layer_forwards, whole.layer_forwards)

  def test_a_resumed_search_runs_only_what_is_left(self):
    batches = np.stack([toy.random_tokens(seed=3)])
    states = []
    settings = {"num_layers": 4, "num_shared": 3}
    loss_fn = ic.LayerwiseLoss(toy.config(), toy.full_params(), batches)
    expected = search.greedy_search(
      loss_fn, **settings, on_evaluation=states.append
    )
    for state in (states[3], states[-1]):
      resumed = ic.LayerwiseLoss(toy.config(), toy.full_params(), batches)
      result = search.greedy_search(resumed, **settings, state=state)
      self.assertEqual(result, expected)
      self.assertLess(resumed.layer_forwards, loss_fn.layer_forwards)
    self.assertEqual(resumed.layer_forwards, 0)


if __name__ == "__main__":
  absltest.main()
