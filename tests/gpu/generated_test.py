# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The check of selections against a sort; what is drawn."""

import numpy as np
from absl.testing import absltest, parameterized

from tests.gpu import generated
from tests.kernels import topk_rows


class WrongSelectionsTest(parameterized.TestCase):
  def right(self, seed=0, num_rows=40, num_keys=60, k=9):
    rng = np.random.default_rng(seed)
    scores = generated.rows(rng, num_rows, num_keys, seed)
    lengths = generated.lengths(rng, num_rows, num_keys, k)
    indices = [
      topk_rows.select(row[:end], k)
      for row, end in zip(scores, lengths, strict=True)
    ]
    return scores, lengths, k, np.stack(indices)

  @parameterized.parameters(*range(6))
  def test_a_right_selection(self, seed):
    self.assertEmpty(generated.wrong_selections(*self.right(seed)))

  def test_without_lengths(self):
    scores = generated.rows(np.random.default_rng(0), 40, 60, 0)
    actual = np.stack([topk_rows.select(row, 9) for row in scores])
    self.assertEmpty(generated.wrong_selections(scores, None, 9, actual))

  @parameterized.parameters(*range(6))
  def test_any_other_selection_is_wrong(self, seed):
    scores, lengths, k, right = self.right(seed)
    rng = np.random.default_rng(seed)
    for row, end in enumerate(lengths):
      actual = right.copy()
      kept = right[row][right[row] >= 0]
      other = np.setdiff1d(np.arange(end), kept)
      if len(kept) and len(other):
        kept[rng.integers(len(kept))] = rng.choice(other)
      elif len(kept):
        kept = kept[1:]
      else:
        kept = np.zeros(1, np.int32)
      actual[row] = np.pad(
        np.sort(kept), (0, k - len(kept)), constant_values=-1
      )
      wrong = generated.wrong_selections(scores, lengths, k, actual)
      self.assertEqual(wrong, [row])

  @parameterized.parameters(
    ([0, 2, -1],), ([2, 1, 0],), ([1, 1, 2],), ([-1, 1, 2],), ([1, 2, 9],)
  )
  def test_malformed_rows_are_wrong(self, indices):
    scores = np.float32([[0, 1, 2, 0]])
    actual = np.array([indices])
    self.assertEqual(generated.wrong_selections(scores, None, 3, actual), [0])


class DrawnTest(absltest.TestCase):
  def test_selections_have_no_index_twice(self):
    for num_keys, k in ((40, 9), (40, 60), (1000, 9)):
      indices = np.asarray(
        generated.selections(np.random.default_rng(0), 2, 30, num_keys, k)
      )
      self.assertLess(indices.max(), num_keys)
      for row in indices.reshape(-1, k):
        chosen = row[row >= 0]
        self.assertLen(np.unique(chosen), len(chosen))
        self.assertTrue(np.all(chosen >= generated.UNSELECTED))

  def test_bounds_have_empty_and_full_queries(self):
    start, end = map(
      np.asarray, generated.bounds(np.random.default_rng(0), 2, 60, 50)
    )
    self.assertTrue(np.any(start >= end))
    self.assertTrue(np.any(end - start == 50))
    self.assertTrue(np.all((start >= 0) & (end <= 50)))


if __name__ == "__main__":
  absltest.main()
