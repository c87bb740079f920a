# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import op_times
from tests.indexcache import toy


class PredictTest(parameterized.TestCase):
  # The paper's 30B model, 12 of 47 indexers kept: the indexer's share of the
  # time (figure 2) and the speed-up that Amdahl's law gives for it.
  @parameterized.parameters(
    (0.27, 1.25), (0.50, 1.59), (0.68, 2.03), (0.81, 2.52), (0.41, 1.44)
  )
  def test_amdahl(self, share, speedup):
    schedule = ic.ReuseSchedule.uniform(47, every=4)
    times = op_times.predict_times(
      op_times.OpTimes(indexer=share / 47, constant=1 - share), schedule
    )
    self.assertAlmostEqual(times.speedup, speedup, delta=0.006)
    self.assertAlmostEqual(times.indexer_share, share)
    self.assertAlmostEqual(times.speedup_limit, 1 / (1 - share))

  def test_by_hand(self):
    times = op_times.predict_times(
      op_times.OpTimes(indexer=4.0, attention=2.0, rest=3.0, constant=1.0),
      ic.ReuseSchedule.from_pattern("FSSF"),
    )
    self.assertEqual(times.scheduled, 1 + 4 * 5 + 2 * 4)
    self.assertEqual(times.all_full, 1 + 4 * 5 + 4 * 4)
    self.assertEqual(times.without_indexers, 21)

  @parameterized.parameters("indexer", "attention", "rest", "constant")
  def test_impossible_times(self, name):
    for value in (-1.0, float("nan"), float("inf")):
      with self.assertRaisesRegex(ValueError, f"`{name}`.*got {value}"):
        op_times.OpTimes(**({"indexer": 1.0} | {name: value}))

  def test_nothing_but_indexers(self):
    with self.assertRaisesRegex(ValueError, "no indexer: got OpTimes"):
      op_times.predict_times(
        op_times.OpTimes(indexer=1.0), ic.ReuseSchedule.all_full(2)
      )


class MeasureTest(parameterized.TestCase):
  def test_times_every_op(self):
    config = toy.config(mlp_layer_types=("dense",) * 4)
    times = op_times.measure_op_times(
      config, num_tokens=5, context=24, num_runs=2
    )
    for name in ("indexer", "attention", "constant"):
      self.assertGreater(getattr(times, name), 0)
    self.assertGreaterEqual(times.rest, 0)

  @parameterized.parameters((0, 4), (5, 4))
  def test_more_tokens_than_context(self, num_tokens, context):
    with self.assertRaisesRegex(ValueError, f"num_tokens={num_tokens}, cont"):
      op_times.measure_op_times(
        toy.config(), num_tokens=num_tokens, context=context
      )


if __name__ == "__main__":
  absltest.main()
