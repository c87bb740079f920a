# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools

import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import dynamic_programming, methods


def loss_fn(schedule):
  return float(sum(n * n % 7 for n in range(1, len(schedule.pattern))
                   if not schedule.is_full(n)))  # fmt: skip


def problem(num_layers=16, **fields):
  return methods.SearchProblem(loss_fn=loss_fn, num_layers=num_layers, **fields)


def chosen(method, num_full, **fields):
  results = method(problem(**fields), [num_full])
  return results[num_full].schedule.pattern


class UniformTest(parameterized.TestCase):
  @parameterized.parameters(
    (16, 8, "FSFSFSFSFSFSFSFS"),
    (16, 4, "FSSSFSSSFSSSFSSS"),
    (16, 2, "FSSSSSSSFSSSSSSS"),
    (16, 1, "FSSSSSSSSSSSSSSS"),
    (16, 6, "FSSFSSFSSFSSFSSF"),
    (7, 3, "FSSFSSF"),
    # No n gives 5 of 8: full at 0, 1, 3, 4, 6.
    (8, 5, "FFSFFSFS"),
    (8, 8, "FFFFFFFF"),
  )
  def test_literal(self, num_layers, num_full, pattern):
    self.assertEqual(
      chosen(methods.uniform, num_full, num_layers=num_layers), pattern
    )

  def test_equals_the_papers_rule_where_there_is_one(self):
    for every in (2, 4, 8):
      paper = ic.ReuseSchedule.uniform(47, every)
      self.assertEqual(
        chosen(methods.uniform, paper.num_full, num_layers=47), paper.pattern
      )

  def test_has_the_number_asked_for_without_pins(self):
    for num_layers in range(1, 30):
      asked = range(1, num_layers + 1)
      results = methods.uniform(problem(num_layers), asked)
      for num_full in asked:
        self.assertEqual(results[num_full].schedule.num_full, num_full)

  def test_pinned_layers_replace_grid_layers(self):
    self.assertEqual(
      chosen(methods.uniform, 4, num_layers=8, pinned=(0, 3)), "FFSFSSFS"
    )
    for num_full in range(3, 17):
      schedule = methods.uniform(problem(pinned=(5, 9)), [num_full])
      schedule = schedule[num_full].schedule
      self.assertTrue(schedule.is_full(5) and schedule.is_full(9))
      self.assertEqual(schedule.num_full, num_full)

  def test_engines_rule_has_one_more(self):
    self.assertEqual(chosen(methods.uniform_freq, 4), "FFSSSFSSSFSSSFSS")
    self.assertEqual(
      chosen(methods.uniform_freq, 4, pinned=(0, 8)), "FFSSSFSSFFSSSFSS"
    )
    self.assertEqual(chosen(methods.uniform_freq, 16), "F" * 16)


class RandomTest(absltest.TestCase):
  def test_is_fixed_by_the_seed_and_nested(self):
    first = methods.random(problem(seed=3, pinned=(0, 7)), range(2, 17))
    again = methods.random(problem(seed=3, pinned=(0, 7)), [5])
    self.assertEqual(first[5], again[5])
    for num_full, result in first.items():
      self.assertEqual(result.schedule.num_full, num_full)
      self.assertTrue(result.schedule.is_full(7))
    for fewer, more in itertools.pairwise(first.values()):
      self.assertContainsSubset(
        fewer.schedule.full_layers, more.schedule.full_layers
      )

  def test_seeds_differ(self):
    base = problem()
    patterns = {
      methods.random(dataclasses.replace(base, seed=seed), [8])[8].schedule
      for seed in range(20)
    }
    self.assertGreater(len(patterns), 15)


class GreedyTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_one_search_serves_all(self, lazy):
    method = methods.METHODS["greedy_lazy" if lazy else "greedy"]
    results = method(problem(pinned=(0, 3), blocks=2), [16, 8, 4])
    self.assertIs(results[4].search, results[8].search)
    for num_full, result in results.items():
      alone = ic.greedy_search(
        loss_fn,
        num_layers=16,
        num_shared=16 - num_full,
        pinned=(0, 3),
        blocks=2,
        lazy=lazy,
      )
      self.assertEqual(result.schedule, alone.schedule)
      self.assertEqual(result.evaluations, alone.evaluations)

  def test_resumes(self):
    states = []
    methods.greedy(problem(8, on_evaluation=states.append), [4])
    self.assertEqual(
      methods.greedy(problem(8, state=states[5]), [4]),
      methods.greedy(problem(8), [4]),
    )


class DynamicProgrammingTest(parameterized.TestCase):
  @parameterized.product(num_layers=(1, 2, 5, 9), seed=(0, 1, 2))
  def test_equals_brute_force(self, num_layers, seed):
    rng = np.random.default_rng(seed)
    similarity = rng.uniform(-1, 1, (num_layers, num_layers))
    similarity[np.triu_indices(num_layers, 1)] = np.nan  # Never read.
    for pinned in ((), tuple(rng.permutation(num_layers)[:2].tolist())):
      for num_full in range(len({0, *pinned}), num_layers + 1):
        expected = max(
          total(similarity, schedule)
          for schedule in every_schedule(num_layers)
          if schedule.num_full == num_full
          and all(map(schedule.is_full, pinned))
        )
        schedule = dynamic_programming.dp_schedule(similarity, num_full, pinned)
        self.assertEqual(schedule.num_full, num_full)
        self.assertTrue(all(map(schedule.is_full, pinned)))
        self.assertAlmostEqual(total(similarity, schedule), expected, places=12)

  def test_literal(self):
    # Layers 0-1 and 2-4 go together.
    similarity = np.array(
      [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.9, 1.0, 0.0, 0.0, 0.0],
        [0.1, 0.1, 1.0, 0.0, 0.0],
        [0.1, 0.1, 0.8, 1.0, 0.0],
        [0.1, 0.1, 0.8, 0.9, 1.0],
      ]
    )
    for num_full, pattern in ((1, "FSSSS"), (2, "FSFSS"), (3, "FSFFS")):
      schedule = dynamic_programming.dp_schedule(similarity, num_full)
      self.assertEqual(schedule.pattern, pattern)

  def test_equal_totals_take_the_lowest_full_layers(self):
    schedule = dynamic_programming.dp_schedule(np.ones((6, 6)), 3)
    self.assertEqual(schedule.pattern, "FFFSSS")

  def test_reads_the_problems_similarity_once(self):
    calls = []

    def similarity():
      calls.append(1)
      return np.eye(16)

    results = methods.dynamic_programming(
      problem(similarity=similarity, blocks=2), [4, 8]
    )
    self.assertLen(calls, 1)
    self.assertTrue(results[4].schedule.is_full(8))
    self.assertEqual(results[8].evaluations, 0)

  def test_bad_similarity(self):
    with self.assertRaisesRegex(ValueError, "got None.*attention_similarity"):
      methods.dynamic_programming(problem(), [4])
    with self.assertRaisesRegex(
      ValueError, r"shape \(3, 3\) for num_layers=16"
    ):
      methods.dynamic_programming(problem(similarity=lambda: np.eye(3)), [4])
    similarity = np.eye(3)
    similarity[2, 1] = np.inf
    with self.assertRaisesRegex(ValueError, r"finite.*\[\[2, 1\]\]"):
      dynamic_programming.dp_schedule(similarity, 2)


def every_schedule(num_layers):
  for letters in itertools.product("FS", repeat=num_layers - 1):
    yield ic.ReuseSchedule("F" + "".join(letters))


def total(similarity, schedule):
  return sum(
    similarity[layer, source]
    for layer, source in enumerate(schedule.source_layers)
  )


class InterfaceTest(parameterized.TestCase):
  @parameterized.parameters(*ic.METHODS)
  def test_every_method_serves_every_number_and_pin(self, name):
    base = problem(9, pinned=(0, 4), similarity=lambda: np.eye(9))
    results = ic.METHODS[name](base, [9, 5, 2])
    self.assertEqual([*results], [9, 5, 2])
    for result in results.values():
      self.assertIsInstance(result, methods.MethodResult)
      self.assertTrue(result.schedule.is_full(4))
      self.assertEqual(result.schedule.num_layers, 9)
    self.assertEqual(results[9].schedule.pattern, "F" * 9)

  @parameterized.parameters(*ic.METHODS)
  def test_impossible_numbers(self, name):
    method = ic.METHODS[name]
    with self.assertRaisesRegex(ValueError, "from 1, .*num_layers=16: got 17"):
      method(problem(), [4, 17])
    with self.assertRaisesRegex(ValueError, r"from 2.*\(0, 3\).*got 1"):
      method(problem(pinned=(3,)), [1])
    with self.assertRaisesRegex(ValueError, "from 0 to 15: got"):
      method(problem(pinned=(16,)), [4])
    with self.assertRaisesRegex(ValueError, "at least one number"):
      method(problem(), [])

  def test_pins_of_a_bare_call(self):
    with self.assertRaisesRegex(ValueError, r"from 0 to 2: got \[5\]"):
      dynamic_programming.dp_schedule(np.eye(3), 2, (5,))


if __name__ == "__main__":
  absltest.main()
