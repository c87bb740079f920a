# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import tpu
from pallas_kernels.topk import (
  mosaic_tpu,
  mosaic_tpu_kernel,
  mosaic_tpu_lists,
)
from tests.kernels import interpreters, loops, topk_test


class MosaicTpuTopKTest(topk_test.TopKTest):
  IMPLEMENTATION = "mosaic_tpu"
  COMPILER_OPTIONS = interpreters.COMPILER_OPTIONS
  # Each is a compilation; the kernel's own shapes are the same for all.
  KEYS_AND_K = ((9, 8), (129, 33))

  def setUp(self):
    super().setUp()
    self.enter_context(interpreters.numbers())

  def test_ties_across_the_segments_of_a_long_row(self):
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 2, size=(2, 40000))
    self.check(scores, 300, [39999, 31000])

  def test_rows_of_several_registers(self):
    rng = np.random.default_rng(6)
    self.check(rng.normal(size=(3, 40000)).round(2), 700)

  def test_one_dense_stretch(self):
    scores = np.full((1, 5000), -1.0)
    scores[0, 1700:4000] = np.arange(2300)
    self.check(scores, 640)

  def test_few_far_apart(self):
    rng = np.random.default_rng(8)
    self.check(rng.normal(size=(9, 20000)), 5)

  def test_more_in_a_group_than_its_list_holds(self):
    scores = np.random.default_rng(9).normal(size=(8, 9000))
    scores[:, 5::128] += 10
    self.check(scores, 64)

  def test_more_slots_than_lanes(self):
    rng = np.random.default_rng(10)
    self.check(rng.normal(size=(1, 20000)).round(1), 16500)


def run(scores, k):
  call = jax.jit(
    lambda scores: mosaic_tpu.top_k(scores, k),
    compiler_options=interpreters.COMPILER_OPTIONS,
  )
  return np.asarray(call(jnp.asarray(scores, jnp.float32)))


class MosaicTpuCopiesTest(parameterized.TestCase):
  """The copies, by interpreters that keep time and are known to fail."""

  def inputs(self):
    # Three groups of eight rows.
    rng = np.random.default_rng(7)
    return rng.normal(size=(24, 200)), 20

  def expected(self):
    scores, k = self.inputs()
    return np.stack([loops.select(np.float32(row), k) for row in scores])

  @parameterized.parameters(*interpreters.MODES)
  def test_rows(self, mode):
    with interpreters.mode(mode):
      np.testing.assert_array_equal(run(*self.inputs()), self.expected())

  @parameterized.parameters("on_wait", "races")
  def test_segments(self, mode):
    scores, k = self.inputs()
    with interpreters.mode(mode):
      indices = run(scores[:3], k)
    np.testing.assert_array_equal(indices, self.expected()[:3])

  @parameterized.parameters("on_wait", "races")
  def test_many_rows_at_a_time(self, mode):
    # Two groups of 32 rows.
    scores = np.random.default_rng(13).normal(size=(64, 200))
    with interpreters.mode(mode):
      indices = run(scores, 20)
    expected = [loops.select(np.float32(row), 20) for row in scores]
    np.testing.assert_array_equal(indices, expected)

  def test_a_missing_wait_is_caught(self):
    # Uninitialised scores are NaN, which nothing selects.
    with (
      mock.patch.object(mosaic_tpu_kernel, "_wait"),
      interpreters.mode("on_wait"),
    ):
      self.assertFalse(np.array_equal(run(*self.inputs()), self.expected()))

  def test_a_copy_into_a_buffer_in_use_is_caught(self):
    order = mosaic_tpu_kernel._order

    def order_late(scores_hbm, ends_ref, scratch, group, segments, shortest):
      """Starts another copy before this group's scores are read."""
      mosaic_tpu_kernel._start_all(scores_hbm, scratch, 0, segments)
      order(scores_hbm, ends_ref, scratch, group, segments, shortest)

    with (
      mock.patch.object(mosaic_tpu_kernel, "_order", order_late),
      interpreters.mode("eager"),
    ):
      self.assertFalse(np.array_equal(run(*self.inputs()), self.expected()))

  def test_the_wrong_group_is_caught(self):
    copies = mosaic_tpu_kernel._copies

    def one_off(scores_hbm, scratch, group, segments, part):
      group = jnp.minimum(group + 1, 2)
      return copies(scores_hbm, scratch, group, segments, part)

    with (
      mock.patch.object(mosaic_tpu_kernel, "_copies", one_off),
      interpreters.mode("on_wait"),
    ):
      self.assertFalse(np.array_equal(run(*self.inputs()), self.expected()))


class MosaicTpuListsTest(parameterized.TestCase):
  """The lists guess; what they lack is found."""

  @parameterized.parameters("_SORT", "_SORT_BITONIC")
  def test_the_comparators_sort(self, name):
    # Of zeros and ones, by which all values are sorted too.
    rows = (np.arange(256)[:, None] >> np.arange(8)) & 1
    if name == "_SORT_BITONIC":
      turns = np.abs(np.diff(rows, axis=1)).sum(axis=1)
      rows = rows[turns <= 2]
    columns = [jnp.asarray(column, jnp.float32) for column in rows.T]
    sorted_ = mosaic_tpu_lists._sort(columns, getattr(mosaic_tpu_lists, name))
    expected = -np.sort(-rows, axis=1)
    np.testing.assert_array_equal(np.stack(sorted_, axis=1), expected)

  def test_empty_lists_change_nothing(self):
    rng = np.random.default_rng(11)
    scores = rng.normal(size=(8, 5000))
    with (
      mock.patch.object(mosaic_tpu_lists, "insert"),
      interpreters.numbers(),
    ):
      indices = run(scores, 40)
    expected = [loops.select(np.float32(row), 40) for row in scores]
    np.testing.assert_array_equal(indices, expected)

  def test_a_missing_second_look_is_caught(self):
    scores = np.random.default_rng(12).normal(size=(8, 5000))
    cond = jax.lax.cond
    with (
      mock.patch.object(mosaic_tpu_lists, "insert"),
      mock.patch.object(
        jax.lax, "cond", lambda _, yes, no: cond(False, yes, no)
      ),
      interpreters.numbers(),
    ):
      indices = run(scores, 40)
    expected = [loops.select(np.float32(row), 40) for row in scores]
    self.assertFalse(np.array_equal(indices, expected))


class BracketTest(parameterized.TestCase):
  """The search alone, on keys that mislead it."""

  @parameterized.parameters(
    ("powers", 2 ** (np.arange(1000) % 31)),
    ("one_far", np.concatenate([np.arange(999), [2**30]])),
    ("negative", -(2 ** (np.arange(1000) % 31))),
    ("ties", np.arange(1000) % 3),
    ("neighbours", (1 << 30) + np.arange(1000)),
    ("both_ends", np.where(np.arange(1000) % 2, 2**30, -(2**30))),
  )
  def test_ends_at_the_kth_key_in_bounded_steps(self, _, keys):
    infinity = mosaic_tpu_kernel._INFINITY
    none = jnp.zeros(1, jnp.int32)
    keys = keys.astype(np.int64)
    step = jax.jit(
      lambda bracket, k, bounds, counts: bracket.narrow(k, bounds, counts)
    )
    between = jax.jit(lambda bracket, k: bracket.between(k))
    for k in (1, 2, 500, 999):
      bracket = mosaic_tpu_kernel._Bracket(
        none + (1 - infinity), none + infinity + 1, none + 1000, none, none
      )
      steps = 0
      while bracket.is_open(k)[0]:
        bounds = between(bracket, k)
        counts = [
          jnp.asarray([np.sum(keys >= int(bound[0]))], jnp.int32)
          for bound in bounds
        ]
        bracket = step(bracket, k, bounds, counts)
        steps += 1
        self.assertLess(steps, 2 * 32 + 10)
      low = int(bracket.low[0])
      self.assertEqual(np.sum(keys >= low), int(bracket.num_low[0]))
      if bracket.num_low[0] != k:
        # More reach it, for it is the k-th itself.
        self.assertEqual(low, np.sort(keys)[-k])


class MosaicTpuUnfitTest(absltest.TestCase):
  def test_a_row_longer_than_vmem(self):
    scores = jax.ShapeDtypeStruct((1, 1 << 27), jnp.float32)
    with (
      interpreters.chip(),
      self.assertRaisesRegex(NotImplementedError, "134217728 scores"),
    ):
      jax.eval_shape(lambda scores: mosaic_tpu.top_k(scores, 8), scores)

  def test_no_tpu(self):
    with self.assertRaisesRegex(
      NotImplementedError, "need a TPU: got the platform 'cpu'"
    ):
      pallas_kernels.top_k(jnp.zeros((1, 8)), 2, implementation="mosaic_tpu")

  def test_an_old_chip(self):
    info = mock.Mock(generation=4, chip_version="v4")
    with (
      mock.patch.object(tpu.pltpu, "get_tpu_info", return_value=info),
      self.assertRaisesRegex(NotImplementedError, "v6e and 7x: got v4"),
    ):
      tpu.chip()


if __name__ == "__main__":
  absltest.main()
