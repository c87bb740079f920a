# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from tests.kernels import errors, loops


class TopKTest(parameterized.TestCase):
  IMPLEMENTATION = "xla"
  COMPILER_OPTIONS = None
  REPEATS = 5
  KEYS_AND_K = tuple(itertools.product((9, 64, 129, 1000), (1, 8, 33)))

  def top_k(self, scores, k, lengths=None):
    run = jax.jit(
      lambda scores, lengths: pallas_kernels.top_k(
        scores, k, lengths, implementation=self.IMPLEMENTATION
      ),
      compiler_options=self.COMPILER_OPTIONS,
    )
    return np.asarray(run(jnp.asarray(scores, jnp.float32), lengths))

  def check(self, scores, k, lengths=None):
    """Compares with the loop, row by row."""
    scores = np.asarray(scores, np.float32)
    if lengths is not None:
      lengths = jnp.asarray(lengths, jnp.int32)
    actual = self.top_k(scores, k, lengths)
    for row in np.ndindex(scores.shape[:-1]):
      length = None if lengths is None else int(lengths[row])
      np.testing.assert_array_equal(
        actual[row], loops.select(scores[row][:length], k), err_msg=str(row)
      )

  def test_random_rows(self):
    for num_keys, k in self.KEYS_AND_K:
      with self.subTest(num_keys=num_keys, k=k):
        rng = np.random.default_rng(num_keys)
        self.check(rng.normal(size=(3, 2, num_keys)), k)

  @parameterized.parameters(1, 2, 3, 5)
  def test_ties_in_bulk_go_to_the_lower_index(self, distinct):
    rng = np.random.default_rng(distinct)
    self.check(rng.integers(0, distinct, size=(4, 200)), 48)

  def test_negative_zero_equals_zero(self):
    self.check([[0.0, -0.0, -1.0, -0.0, 0.0], [-0.0, 0.0, -0.0, 0.0, -0.0]], 2)

  def test_rows_with_their_own_lengths(self):
    rng = np.random.default_rng(0)
    self.check(rng.normal(size=(2, 4, 50)), 8, [[0, 1, 7, 8], [9, 31, 49, 50]])

  def test_k_of_at_least_all_keys(self):
    rng = np.random.default_rng(1)
    for k in (7, 8, 20):
      self.check(rng.normal(size=(3, 7)), k, [7, 3, 0])

  def test_nan_behind_the_length_is_not_read(self):
    scores = np.random.default_rng(2).normal(size=(3, 40))
    lengths = [5, 20, 0]
    for row, length in enumerate(lengths):
      scores[row, length:] = np.nan
    self.check(scores, 8, lengths)

  def test_nan_and_minus_infinity_are_never_selected(self):
    scores = np.full((1, 12), -np.inf)
    scores[0, [2, 5, 7]] = [np.nan, -3.0, np.inf]
    np.testing.assert_array_equal(self.top_k(scores, 4), [[5, 7, -1, -1]])
    self.check(np.full((2, 6), np.nan), 3)

  def test_extreme_values(self):
    tiny = np.finfo(np.float32).tiny
    self.check([[np.inf, 3e38, -3e38, tiny, -tiny, 0.0, np.inf, 1.0]], 3)

  def test_narrow_band(self):
    rng = np.random.default_rng(3)
    ulps = rng.integers(0, 50, size=(2, 300))
    self.check(1.0 + ulps * np.finfo(np.float32).eps, 64)

  def test_run_to_run_bit_equal(self):
    scores = np.random.default_rng(4).integers(0, 3, size=(8, 257))
    run = jax.jit(
      lambda scores: pallas_kernels.top_k(
        scores, 32, implementation=self.IMPLEMENTATION
      ),
      compiler_options=self.COMPILER_OPTIONS,
    )
    scores = jnp.asarray(scores, jnp.float32)
    first = np.asarray(run(scores))
    for _ in range(self.REPEATS):
      np.testing.assert_array_equal(run(scores), first)

  def test_no_rows_and_no_scores(self):
    self.assertEqual(self.top_k(np.zeros((3, 0, 8)), 2).shape, (3, 0, 2))
    self.check(np.zeros((2, 0)), 2)

  def test_errors(self):
    scores = jnp.zeros((2, 4))
    with errors.unchecked():
      with self.assertRaisesRegex(ValueError, "`k` must be at least 1: got 0"):
        pallas_kernels.top_k(scores, 0)
      with self.assertRaisesRegex(ValueError, r"lengths.shape=\(3,\)"):
        pallas_kernels.top_k(scores, 1, jnp.zeros((3,), jnp.int32))


if __name__ == "__main__":
  absltest.main()
