# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
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


def two_layers():
  """A model that compiles in no time: two layers, no experts."""
  return toy.config().replace(
    num_hidden_layers=2,
    first_k_dense_replace=2,
    schedule=ic.ReuseSchedule("FS"),
  )


@functools.lru_cache
def initial_params():
  return training.init_state(two_layers(), train_config()).params


def state_at(train, step):
  # A copy: the step donates its state.
  state = training.init_state(two_layers(), train, initial_params())
  # The rates follow the optimiser's own count of steps.
  opt_state = jax.tree.map(
    lambda x: jnp.full_like(x, step) if x.dtype == jnp.int32 else x,
    state.opt_state,
  )
  return state.replace(step=jnp.int32(step), opt_state=opt_state)


class StagesTest(parameterized.TestCase):
  @parameterized.parameters(
    ("dense", "all", 0, False, True),
    ("warmup", "all", 3, True, False),
    ("sparse", "all", 5, True, True),
    ("sparse", "indexers", 5, True, False),
    ("sparse", "rest", 5, False, True),
  )
  def test_a_stage_moves_its_parameters_and_freezes_the_rest(
    self, stage, sparse_trains, step, moves_indexers, moves_rest
  ):
    train = train_config(sparse_trains=sparse_trains)
    self.assertEqual(train.stage(step), stage)
    before = flat(initial_params())
    tokens = toy.random_tokens(length=24)
    state, metrics = training.train_step(
      two_layers(), train, stage, state_at(train, step), tokens
    )
    training.check_finite(step, metrics)
    self.assertEqual(int(state.step), step + 1)
    for path, value in flat(state.params).items():
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

  def test_parts_give_the_step_of_the_whole(self):
    tokens = toy.random_tokens(batch=4, length=24)
    results = [
      training.train_step(
        two_layers(),
        train_config(batch_size=4, accumulation=accumulation),
        "warmup",
        state_at(train_config(), 3),
        tokens,
      )[1]
      for accumulation in (1, 2)
    ]
    for field in ("loss", "index_kl", "grad_norm"):
      whole, parts = (getattr(metrics, field) for metrics in results)
      np.testing.assert_allclose(whole, parts, rtol=1e-5, err_msg=field)

  def test_mixed_precision_keeps_float32_parameters(self):
    config = two_layers().replace(dtype=jnp.bfloat16)
    train = train_config(learning_rate=1e-6)
    state, metrics = training.train_step(
      config,
      train,
      "dense",
      state_at(train, 2),
      toy.random_tokens(length=24),
    )
    for leaf in jax.tree.leaves(state.params):
      self.assertEqual(leaf.dtype, jnp.float32)
    self.assertEqual(metrics.loss.dtype, jnp.float32)
    # Smaller than bfloat16 resolves.
    before = flat(initial_params())["lm_head", "kernel"]
    after = np.asarray(state.params["lm_head"]["kernel"])
    self.assertTrue(np.any(after != before))
    np.testing.assert_allclose(after, before, atol=1e-5)


class BatchTest(absltest.TestCase):
  def test_depends_on_seed_and_step_alone(self):
    tokens = np.arange(5000, dtype=np.int32) % 251
    train = train_config(
      context=300, batch_size=20, mixture=(("text", 1.0), ("needle", 1.0))
    )
    first = training.training_batch(tokens, train, 7)
    self.assertEqual(first.shape, (20, 300))
    np.testing.assert_array_equal(
      first, training.training_batch(tokens, train, 7)
    )
    self.assertFalse(
      np.array_equal(first, training.training_batch(tokens, train, 8))
    )
    hidden = [b"the code of" in bytes(row.astype(np.uint8)) for row in first]
    self.assertBetween(sum(hidden), 4, 16)

  def test_short_sequences_first(self):
    train = train_config(short_context=8, short_steps=2)
    self.assertEqual(
      [train.batch_shape(step) for step in (0, 1, 2, 8)],
      [(6, 8), (6, 8), (2, 24), (2, 24)],
    )
    tokens = np.arange(100, dtype=np.int32)
    self.assertEqual(training.training_batch(tokens, train, 0).shape, (6, 8))

  def test_fewer_sequences_in_the_warm_up(self):
    train = train_config(warmup_batch_size=1)
    start = train.dense_steps
    self.assertEqual(
      [train.batch_shape(step)[0] for step in (start - 1, start)], [2, 1]
    )
    self.assertEqual(train.batch_shape(train.num_steps - 1)[0], 2)


class ErrorsTest(absltest.TestCase):
  def test_names_step_and_tensor(self):
    train = train_config()
    state = state_at(train, 0)
    state.params["layers_1"]["mlp"]["down_proj"]["kernel"] *= np.nan
    _, metrics = training.train_step(
      two_layers(), train, "dense", state, toy.random_tokens(length=24)
    )
    with self.assertRaisesRegex(
      FloatingPointError,
      "at step 3 got loss=nan.*: embed_tokens/embedding.* and .. more",
    ):
      training.check_finite(3, metrics)
    one = jax.tree.map(lambda _: True, initial_params())
    one["norm"]["scale"] = False
    with self.assertRaisesRegex(
      FloatingPointError, "not finite: norm/scale. Lower"
    ):
      training.check_finite(3, metrics._replace(is_finite=one))

  def test_settings(self):
    for changes, message in (
      ({"context": 0}, "`context` must be at least 1: got 0"),
      ({"dense_steps": -1}, "`dense_steps` must not be negative: got -1"),
      ({"density": 1.5}, "`density` .*: got 1.5"),
      ({"mixture": (("prose", 1.0),)}, "`mixture` .*got 'prose:1'"),
      ({"short_context": 7}, "`short_context` must divide .*=7 .*=24"),
      ({"short_steps": 4}, "`short_steps` .*=4 for dense_steps=3"),
      ({"accumulation": 4}, "`accumulation` must divide .*=4 .*=2"),
      (
        {"accumulation": 2, "warmup_batch_size": 3},
        "`accumulation` must divide `warmup_batch_size`: .*=2 .*=3",
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        train_config(**changes)


if __name__ == "__main__":
  absltest.main()
