# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from indexcache_jax import mlp
from tests import tolerances
from tests.indexcache import toy

NUM_EXPERTS, HIDDEN, INNER = 8, 32, 16


def looped_route(logits, bias, config):
  """Experts and weights of every row, one at a time, in float64."""
  all_experts, all_weights = [], []
  size = NUM_EXPERTS // config.n_group
  for row in np.asarray(logits, np.float64):
    scores = 1 / (1 + np.exp(-row))
    corrected = scores + np.asarray(bias, np.float64)
    candidates = range(NUM_EXPERTS)
    if config.n_group > 1:
      groups = corrected.reshape(config.n_group, size)
      best = [sum(sorted(group)[-2:]) for group in groups]
      kept = sorted(range(config.n_group), key=lambda g: (-best[g], g))
      kept = kept[: config.topk_group]
      candidates = [e for e in candidates if e // size in kept]
    experts = sorted(candidates, key=lambda e: (-corrected[e], e))
    experts = experts[: config.num_experts_per_tok]
    weights = scores[experts]
    if config.norm_topk_prob:
      weights = weights / weights.sum()
    all_experts.append(experts)
    all_weights.append(weights * config.routed_scaling_factor)
  return np.array(all_experts), np.array(all_weights)


class RouteTest(parameterized.TestCase):
  @parameterized.product(
    # Experts a token, groups, groups kept.
    sizes=((2, 4, 2), (2, 1, 1), (3, 2, 1), (8, 1, 1), (1, 4, 1)),
    norm_topk_prob=(True, False),
    # The corrected scores of "low" are all negative.
    bias=("zero", "mixed", "low"),
  )
  def test_equals_a_float64_loop(self, sizes, norm_topk_prob, bias):
    per_token, n_group, topk_group = sizes
    config = toy.config(
      num_experts_per_tok=per_token,
      n_group=n_group,
      topk_group=topk_group,
      norm_topk_prob=norm_topk_prob,
      routed_scaling_factor=2.5,
    )
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, NUM_EXPERTS)).astype(np.float32)
    bias = {
      "zero": np.zeros(NUM_EXPERTS),
      "mixed": rng.normal(size=NUM_EXPERTS) * 0.3,
      "low": rng.normal(size=NUM_EXPERTS) * 0.3 - 4,
    }[bias].astype(np.float32)
    experts, weights = looped_route(logits, bias, config)
    routing = mlp.route(jnp.asarray(logits), jnp.asarray(bias), config)
    np.testing.assert_array_equal(routing.experts, experts)
    np.testing.assert_allclose(
      routing.weights, weights, **tolerances.tolerance("float32", 8)
    )

  def test_the_correction_selects_but_does_not_weigh(self):
    config = toy.config(
      n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0
    )
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0, -2.0, -3.0, 0.0, 0.0]])
    bias = jnp.zeros(NUM_EXPERTS).at[5].set(10.0)
    routing = mlp.route(logits, bias, config)
    np.testing.assert_array_equal(routing.experts, [[5, 0]])
    np.testing.assert_allclose(
      routing.weights,
      [[1 / (1 + np.exp(3)), 1 / (1 + np.exp(-2))]],
      **tolerances.tolerance("float32"),
    )

  def test_the_best_expert_stays_out_with_a_poor_group(self):
    # Group 0 holds the best expert; the two best of groups 1 and 2 sum higher.
    config = toy.config()
    logits = jnp.array([[3.0, -9.0, 1.0, 1.5, 1.0, 1.2, -9.0, -9.0]])
    routing = mlp.route(logits, jnp.zeros(NUM_EXPERTS), config)
    np.testing.assert_array_equal(routing.experts, [[3, 5]])

  @parameterized.parameters((1, 1), (4, 2))
  def test_ties_go_to_the_lower_expert(self, n_group, topk_group):
    config = toy.config(n_group=n_group, topk_group=topk_group)
    logits = jnp.array([[0.5] * 8, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    routing = mlp.route(logits, jnp.zeros(NUM_EXPERTS), config)
    np.testing.assert_array_equal(routing.experts, [[0, 1], [2, 3]])
    np.testing.assert_allclose(
      routing.weights, 0.75, **tolerances.tolerance("float32")
    )

  def test_weights_of_saturated_scores_are_finite(self):
    # sigmoid(-200) is 0 in float32: a sum of zeros.
    routing = mlp.route(
      jnp.full((1, NUM_EXPERTS), -200.0), jnp.zeros(NUM_EXPERTS), toy.config()
    )
    np.testing.assert_array_equal(routing.weights, [[0.0, 0.0]])

  def test_nan_leaves_experts_in_their_range(self):
    logits = jnp.full((3, NUM_EXPERTS), jnp.nan).at[0].set(1.0).at[1, 3].set(2)
    routing = mlp.route(logits, jnp.zeros(NUM_EXPERTS), toy.config())
    self.assertTrue(np.all(routing.experts >= 0))
    self.assertTrue(np.all(routing.experts < NUM_EXPERTS))
    np.testing.assert_array_equal(routing.experts[0], [0, 1])


def silu(x):
  return x / (1 + np.exp(-x))


def dense_mlp(x, gate, up, down):
  return (silu(x @ gate) * (x @ up)) @ down


def looped_sparse_mlp(params, config, hidden):
  """Every row through each of its experts, in float64."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  rows = np.asarray(hidden, np.float64).reshape(-1, HIDDEN)
  experts, weights = looped_route(
    rows @ params["gate"]["kernel"],
    params["gate"]["e_score_correction_bias"],
    config,
  )
  kernels = [params["experts"][f"{name}_proj"] for name in KERNELS]
  outputs = np.zeros_like(rows)
  for row, row_experts, row_weights in zip(
    range(len(rows)), experts, weights, strict=True
  ):
    for expert, weight in zip(row_experts, row_weights, strict=True):
      outputs[row] += weight * dense_mlp(
        rows[row], *(k[expert] for k in kernels)
      )
  if config.n_shared_experts:
    shared = params["shared_experts"]
    outputs += dense_mlp(
      rows, *(shared[f"{name}_proj"]["kernel"] for name in KERNELS)
    )
  return outputs.reshape(hidden.shape)


KERNELS = ("gate", "up", "down")


def make_params(config, seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(
      rng.normal(size=shape) * shape[-2] ** -0.5, config.param_dtype
    )

  experts = [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]
  params = {
    "gate": {
      "kernel": draw(HIDDEN, NUM_EXPERTS),
      "e_score_correction_bias": jnp.asarray(
        rng.normal(size=NUM_EXPERTS) * 0.1, jnp.float32
      ),
    },
    "experts": {
      f"{name}_proj": draw(NUM_EXPERTS, *shape)
      for name, shape in zip(KERNELS, experts, strict=True)
    },
  }
  if config.n_shared_experts:
    width = INNER * config.n_shared_experts
    shared = [(HIDDEN, width), (HIDDEN, width), (width, HIDDEN)]
    params["shared_experts"] = {
      f"{name}_proj": {"kernel": draw(*shape)}
      for name, shape in zip(KERNELS, shared, strict=True)
    }
  return params


def crowded(params):
  """All rows go to experts 4 and 5; six groups of rows are empty."""
  bias = jnp.zeros(NUM_EXPERTS).at[4:6].set(20.0)
  gate = params["gate"] | {"e_score_correction_bias": bias}
  return params | {"gate": gate}


def hidden_states(batch=2, length=7, dtype=jnp.float32):
  return jax.random.normal(
    jax.random.key(3), (batch, length, HIDDEN), jnp.float32
  ).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def sparse_mlp(config, params, hidden):
  return mlp.SparseMLP(config).apply({"params": params}, hidden)


class SparseMLPTest(parameterized.TestCase):
  def assert_equals_loop(self, config, params, hidden):
    actual = sparse_mlp(config, params, hidden)
    self.assertEqual(actual.dtype, config.dtype)
    np.testing.assert_allclose(
      np.asarray(actual, np.float64),
      looped_sparse_mlp(params, config, hidden),
      # The products through two matrices; values are of order one.
      **tolerances.tolerance(config.dtype, HIDDEN),
    )

  @parameterized.parameters(0, 1, 2)
  def test_equals_a_loop_over_experts(self, n_shared_experts):
    config = toy.config(n_shared_experts=n_shared_experts)
    self.assert_equals_loop(config, make_params(config), hidden_states())

  def test_one_token_leaves_most_experts_without_rows(self):
    config = toy.config()
    self.assert_equals_loop(config, make_params(config), hidden_states(1, 1))

  def test_experts_without_rows(self):
    config = toy.config()
    params = crowded(make_params(config))
    self.assert_equals_loop(config, params, hidden_states())

  def test_every_expert_for_every_row(self):
    config = toy.config(num_experts_per_tok=8, n_group=1, topk_group=1)
    self.assert_equals_loop(config, make_params(config), hidden_states())

  def test_bfloat16(self):
    # The router stays float32: the same experts, whatever the dtype.
    config = toy.config(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    hidden = hidden_states(dtype=jnp.bfloat16)
    self.assert_equals_loop(config, make_params(config), hidden)

  def test_gradients_are_those_of_a_dense_sum(self):
    config = toy.config(n_shared_experts=0)
    params, hidden = make_params(config), hidden_states()

    def dense_sum(config, params, hidden):
      rows = hidden.reshape(-1, HIDDEN)
      logits = jnp.matmul(rows, params["gate"]["kernel"], precision="highest")
      routing = mlp.route(
        logits, params["gate"]["e_score_correction_bias"], config
      )
      one_hot = jax.nn.one_hot(routing.experts, NUM_EXPERTS)
      weights = jnp.sum(one_hot * routing.weights[..., None], axis=1)
      gate, up, down = (params["experts"][f"{name}_proj"] for name in KERNELS)
      product = functools.partial(jnp.einsum, precision="highest")
      inner = jax.nn.silu(product("mh,ehi->mei", rows, gate))
      inner = inner * product("mh,ehi->mei", rows, up)
      outputs = product("mei,eih,me->mh", inner, down, weights)
      return outputs.reshape(hidden.shape)

    def grads(form):
      def loss(params, hidden):
        return jnp.mean(form(config, params, hidden) ** 2)

      return jax.jit(jax.grad(loss, (0, 1)))(params, hidden)

    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, **tolerances.tolerance("float32", HIDDEN, grads=True)
      ),
      grads(sparse_mlp),
      grads(dense_sum),
    )

  def test_gradients_are_finite_and_zero_for_an_expert_without_rows(self):
    config = toy.config()

    def loss(params, hidden):
      return jnp.mean(sparse_mlp(config, params, hidden) ** 2)

    grads, of_hidden = jax.jit(jax.grad(loss, (0, 1)))(
      crowded(make_params(config)), hidden_states()
    )
    for leaf in jax.tree.leaves((grads, of_hidden)):
      self.assertTrue(np.all(np.isfinite(leaf)))
    for name in KERNELS:
      moved = np.any(grads["experts"][f"{name}_proj"] != 0, axis=(1, 2))
      self.assertEqual(moved.tolist(), [False] * 4 + [True] * 2 + [False] * 2)
    # It only selects.
    self.assertFalse(np.any(grads["gate"]["e_score_correction_bias"]))
    self.assertTrue(np.any(grads["gate"]["kernel"]))
    self.assertTrue(np.any(of_hidden))


class DenseMLPTest(absltest.TestCase):
  def test_equals_numpy(self):
    config = toy.config()
    params = make_params(config)["shared_experts"]
    actual = mlp.DenseMLP(config, INNER).apply(
      {"params": params}, hidden_states()
    )
    kernels = [
      np.asarray(params[f"{name}_proj"]["kernel"], np.float64)
      for name in KERNELS
    ]
    np.testing.assert_allclose(
      actual,
      dense_mlp(np.asarray(hidden_states(), np.float64), *kernels),
      **tolerances.tolerance("float32", HIDDEN),
    )


if __name__ == "__main__":
  absltest.main()
