# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import fractions

from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import comparison, methods

HALF, QUARTER = fractions.Fraction(1, 2), fractions.Fraction(1, 4)


def held_out_loss(schedule):
  """Sharing layer l costs l hundredths."""
  return 1.0 + sum(
    layer / 100
    for layer, letter in enumerate(schedule.pattern)
    if letter == "S"
  )


def compare(chosen, retentions=(HALF, QUARTER), loss=held_out_loss):
  def problem(name):
    return methods.SearchProblem(loss_fn=held_out_loss, num_layers=8)

  return list(comparison.compare(chosen, problem, retentions, loss))


class CompareTest(parameterized.TestCase):
  @parameterized.parameters(
    (47, HALF, 24), (47, QUARTER, 12), (12, fractions.Fraction(1, 8), 2)
  )
  def test_full_layers_of_a_retention(self, num_layers, retention, expected):
    self.assertEqual(
      comparison.num_full_layers(retention, num_layers), expected
    )

  def test_each_method_at_each_retention(self):
    rows = compare({name: ic.METHODS[name] for name in ("uniform", "greedy")})
    self.assertEqual(
      [(row.method, row.retention, row.schedule.pattern) for row in rows],
      [
        ("uniform", HALF, "FSFSFSFS"),
        ("uniform", QUARTER, "FSSSFSSS"),
        ("greedy", HALF, "FSSSSFFF"),
        ("greedy", QUARTER, "FSSSSSSF"),
      ],
    )
    self.assertAlmostEqual(rows[0].loss, 1.16)
    self.assertAlmostEqual(rows[0].loss_delta, 0.16)
    self.assertEqual([row.evaluations for row in rows], [0, 0, 22, 27])
    self.assertIsNone(rows[0].search)
    self.assertLen(rows[3].search.trace, 6)

  def test_takes_a_function_of_ones_own_and_no_loss_twice(self):
    asked = []

    def counted(schedule):
      asked.append(schedule.pattern)
      return held_out_loss(schedule)

    def last_layers(problem, num_fulls):
      return {
        n: methods.MethodResult(
          ic.ReuseSchedule("F" * n + "S" * (problem.num_layers - n))
        )
        for n in num_fulls
      }

    rows = compare({"mine": last_layers, "again": last_layers}, loss=counted)
    self.assertEqual(rows[1].schedule.pattern, "FFSSSSSS")
    self.assertEqual(asked, ["F" * 8, "FFFFSSSS", "FFSSSSSS"])

  def test_recommends_the_fewest_indexers_within_the_tolerance(self):
    rows = compare({name: ic.METHODS[name] for name in ("uniform", "greedy")})
    for tolerance, expected in ((0.3, (3, True)), (0.18, (2, True))):
      row, is_within = comparison.recommend(rows, max_loss_increase=tolerance)
      self.assertEqual((rows.index(row), is_within), expected)
    row, is_within = comparison.recommend(rows, max_loss_increase=0.001)
    self.assertEqual(
      (row.loss, is_within), (min(row.loss for row in rows), False)
    )

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, "above 0, at most 1: got 3/2"):
      comparison.num_full_layers(fractions.Fraction(3, 2), 8)


if __name__ == "__main__":
  absltest.main()
