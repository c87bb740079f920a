# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from indexcache_jax import training
from tests.indexcache import toy


def train_config(**changes):
  defaults = {
    "context": 24,
    "batch_size": 2,
    "dense_steps": 3,
    "warmup_steps": 2,
    "sparse_steps": 4,
    "ramp_steps": 2,
  }
  return training.TrainConfig(**(defaults | changes))


def flat(params):
  return flax.traverse_util.flatten_dict(jax.tree.map(np.array, params))


class StagesTest(parameterized.TestCase):
  @parameterized.parameters(
    ("dense", 0, False, True),
    ("warmup", 3, True, False),
    ("sparse", 5, True, True),
  )
  def test_a_stage_moves_its_parameters_and_freezes_the_rest(
    self, stage, step, moves_indexers, moves_rest
  ):
    config = toy.config("FSFF")
    train = train_config()
    self.assertEqual(train.stage(step), stage)
    # A copy: the step donates its state.
    params = jax.tree.map(jnp.copy, toy.params_for(config))
    before = flat(params)
    opt_state = training.make_optimizer(train).init(params)
    # The rates follow the optimiser's own count of steps.
    opt_state = jax.tree.map(
      lambda x: jnp.full_like(x, step) if x.dtype == jnp.int32 else x, opt_state
    )
    state = training.TrainState(jnp.int32(step), params, opt_state)
    tokens = toy.random_tokens(length=24)
    state, metrics = training.train_step(config, train, stage, state, tokens)
    training.check_finite(step, metrics, state)
    self.assertEqual(int(state.step), step + 1)
    for path, value in flat(state.params).items():
      if path[-1] == "e_score_correction_bias":
        continue  # It selects, hence has no gradient.
      moved = not np.array_equal(value, before[path])
      expected = moves_indexers if training.is_indexer(path) else moves_rest
      self.assertEqual(moved, expected, path)

  def test_rates_by_stage(self):
    train = train_config(
      learning_rate=1.0, indexer_learning_rate=1.0, ramp_steps=1
    )
    main, indexer = training.learning_rates(train)
    self.assertAlmostEqual(float(main(0)), 1.0)
    self.assertEqual([float(main(step)) for step in (3, 4)], [0, 0])
    self.assertEqual([float(indexer(step)) for step in (0, 2)], [0, 0])
    self.assertEqual([float(indexer(step)) for step in (3, 4)], [1, 1])
    np.testing.assert_allclose(float(main(5)), 0.1, rtol=1e-6)
    np.testing.assert_allclose(float(indexer(7)), 0.05, rtol=1e-6)


class BatchTest(absltest.TestCase):
  def test_depends_on_seed_and_step_alone(self):
    tokens = np.arange(5000, dtype=np.int32) % 251
    train = train_config(context=300, batch_size=4, needle_fraction=0.5)
    first = training.training_batch(tokens, train, 7)
    np.testing.assert_array_equal(
      first, training.training_batch(tokens, train, 7)
    )
    self.assertFalse(
      np.array_equal(first, training.training_batch(tokens, train, 8))
    )
    hidden = [b"the code of" in bytes(row.astype(np.uint8)) for row in first]
    self.assertEqual(hidden, [True, True, False, False])


class ErrorsTest(absltest.TestCase):
  def test_names_step_and_tensor(self):
    params = {"a": {"kernel": jnp.array([1.0, jnp.nan])}, "b": jnp.ones(1)}
    state = training.TrainState(jnp.int32(4), params, ())
    metrics = training.Metrics(jnp.nan, 0.0, 1.0)
    with self.assertRaisesRegex(FloatingPointError, "step 3 .*: a/kernel"):
      training.check_finite(3, metrics, state)

  def test_settings(self):
    for changes, message in (
      ({"context": 0}, "`context` must be at least 1: got 0"),
      ({"dense_steps": -1}, "`dense_steps` must not be negative: got -1"),
      ({"needle_fraction": 1.5}, r"`needle_fraction` .*\[0, 1\]: got 1.5"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        train_config(**changes)


if __name__ == "__main__":
  absltest.main()
