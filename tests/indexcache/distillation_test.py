# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import attention, dense_mla, distillation
from pallas_kernels import chunking
from tests import tolerances
from tests.indexcache import toy


def gradients(config, kind, **kwargs):
  """Gradients by path of the distillation loss alone."""

  def loss(params):
    _, aux = ic.SparseTransformer(config).apply(
      {"params": params}, toy.random_tokens(), attention_kind=kind
    )
    return distillation.distillation_loss(aux, config, **kwargs)

  grads = jax.jit(jax.grad(loss))(toy.params_for(config))
  return flax.traverse_util.flatten_dict(grads)


def numpy_kl(inputs, state, key_start, key_end, scale, selected):
  """KL of row 0 by a float64 loop over the keys that count."""
  query, latent = (np.asarray(x[0], np.float64) for x in inputs)
  index_q, index_k, weights = (np.asarray(x[0], np.float64) for x in state[1:])
  result = []
  for t in range(query.shape[0]):
    if selected:
      keys = [s for s in np.asarray(state.topk_indices[0, t]) if s >= 0]
    else:
      keys = list(range(int(key_start[0, t]), int(key_end[0, t])))
    logits = query[t] @ latent[keys].T * scale
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    teacher = (probs / probs.sum(axis=-1, keepdims=True)).mean(axis=0)
    scores = weights[t] @ np.maximum(index_q[t] @ index_k[keys].T, 0)
    log_q = scores - scores.max()
    log_q -= np.log(np.exp(log_q).sum())
    result.append(float(np.sum(teacher * (np.log(teacher) - log_q))))
  return result


class DistillationTest(parameterized.TestCase):
  @parameterized.parameters("dense", "sparse")
  def test_equals_a_float64_loop(self, kind):
    config = toy.config("FSFF")
    _, aux = toy.forward(
      config, toy.params_for(config), toy.random_tokens(), kind=kind
    )
    for layer in range(4):
      expected = numpy_kl(
        aux.attention_inputs[layer],
        aux.index_states[layer],
        aux.key_start,
        aux.key_end,
        config.attention_scale,
        selected=kind == "sparse",
      )
      np.testing.assert_allclose(
        distillation.layer_kl(aux, config, layer)[0],
        expected,
        **tolerances.tolerance("float32", toy.LENGTH * 4),
      )

  @parameterized.product(kind=("dense", "sparse"), multi_layer=(True, False))
  def test_trains_the_indexers_of_full_layers_and_nothing_else(
    self, kind, multi_layer
  ):
    config = toy.config("FSFS")
    for path, grad in gradients(config, kind, multi_layer=multi_layer).items():
      self.assertTrue(np.all(np.isfinite(grad)), path)
      self.assertEqual("indexer" in path, bool(np.any(grad)), path)

  def test_language_model_loss_trains_no_indexer(self):
    config = toy.config("FSFS")

    def loss(params):
      logits, _ = ic.SparseTransformer(config).apply(
        {"params": params}, toy.random_tokens()
      )
      return jnp.mean(ic.next_token_losses(logits, toy.random_tokens()))

    grads = jax.jit(jax.grad(loss))(toy.params_for(config))
    for path, grad in flax.traverse_util.flatten_dict(grads).items():
      if "indexer" in path:
        self.assertFalse(np.any(grad), path)

  def test_multi_layer_gradient_is_that_of_the_averaged_teacher(self):
    # The paper's proposition 1, for one full layer that serves three.
    rng = np.random.default_rng(0)
    keys = 12
    teachers = jnp.asarray(
      rng.dirichlet(np.ones(keys), size=(3, 5)), jnp.float32
    )
    scores = jnp.asarray(rng.normal(size=(5, keys)), jnp.float32)

    def multi(scores):
      log_q = jax.nn.log_softmax(scores)
      return sum(
        jnp.sum(distillation.kl_divergence(log_q, p)) / 3 for p in teachers
      )

    def averaged(scores):
      return jnp.sum(
        distillation.kl_divergence(
          jax.nn.log_softmax(scores), jnp.mean(teachers, axis=0)
        )
      )

    np.testing.assert_allclose(
      jax.grad(multi)(scores),
      jax.grad(averaged)(scores),
      **tolerances.tolerance("float32", keys, grads=True),
    )

  def test_own_layer_loss_ignores_shared_layers(self):
    config = toy.config("FSSS")
    _, aux = toy.forward(config, toy.params_for(config), toy.random_tokens())
    own = distillation.distillation_loss(aux, config, multi_layer=False)
    kls = [distillation.layer_kl(aux, config, layer) for layer in range(4)]
    np.testing.assert_allclose(own, jnp.mean(kls[0]), rtol=1e-6)
    multi = distillation.distillation_loss(aux, config)
    np.testing.assert_allclose(multi, jnp.mean(jnp.stack(kls)), rtol=1e-6)

  def test_where_leaves_tokens_out(self):
    config = toy.config("FSSS")
    _, aux = toy.forward(config, toy.params_for(config), toy.random_tokens())
    where = jnp.arange(toy.LENGTH) < 20
    where = jnp.broadcast_to(where, (2, toy.LENGTH))
    loss = distillation.distillation_loss(
      aux, config, multi_layer=False, where=where
    )
    kl = distillation.layer_kl(aux, config, 0)
    np.testing.assert_allclose(loss, jnp.mean(kl[:, :20]), rtol=1e-6)

  def test_zero_targets_beside_minus_infinity_give_no_nan(self):
    log_predictions = jnp.array([[-jnp.inf, 0.0]])
    targets = jnp.array([[0.0, 1.0]])
    value, grad = jax.value_and_grad(
      lambda x: jnp.sum(distillation.kl_divergence(x, targets))
    )(log_predictions)
    self.assertEqual(float(value), 0.0)
    self.assertTrue(np.all(np.isfinite(grad)))

  def test_runtime_schedule_has_no_indexer_outputs(self):
    config = toy.config()
    _, aux = ic.SparseTransformer(config).apply(
      {"params": toy.full_params()},
      toy.random_tokens(),
      runtime_schedule=jnp.array([1, 0, 1, 1]),
    )
    with self.assertRaisesRegex(ValueError, "schedule in its config"):
      distillation.layer_kl(aux, config, 1)


class DenseMlaTest(absltest.TestCase):
  def test_chunks_give_the_numbers_of_one_pass(self):
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.normal(size=(2, 13, 3, 8)), jnp.float32)
    latent = jnp.asarray(rng.normal(size=(2, 13, 8)), jnp.float32)
    start = jnp.zeros((2, 13), jnp.int32)
    end = jnp.broadcast_to(jnp.arange(1, 14), (2, 13)).astype(jnp.int32)

    def loss(query, latent):
      out = dense_mla.dense_mla(
        query, latent, start, end, scale=0.3, value_dim=6
      )
      return jnp.sum(out**2), out

    whole = jax.value_and_grad(loss, (0, 1), has_aux=True)(query, latent)
    original = chunking.CHUNK_BYTES
    self.addCleanup(setattr, chunking, "CHUNK_BYTES", original)
    chunking.CHUNK_BYTES = 4 * 2 * 3 * 13 * 4
    chunked = jax.value_and_grad(loss, (0, 1), has_aux=True)(query, latent)
    for a, b in zip(
      jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True
    ):
      np.testing.assert_allclose(
        a, b, **tolerances.tolerance("float32", 13 * 18, grads=True)
      )

  def test_a_query_without_keys_is_zero_and_has_no_nan(self):
    query, latent = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 4))
    start = jnp.array([[0, 2]], jnp.int32)
    end = jnp.array([[1, 2]], jnp.int32)

    def loss(query):
      out = dense_mla.dense_mla(
        query, latent, start, end, scale=1.0, value_dim=4
      )
      return jnp.sum(out), out

    grad, out = jax.grad(loss, has_aux=True)(query)
    np.testing.assert_array_equal(out[0, 1], np.zeros((1, 4)))
    self.assertTrue(np.all(np.isfinite(grad)))


class ContextTest(absltest.TestCase):
  def test_segments_restart_positions_and_visibility(self):
    context = attention.make_context(
      toy.config(),
      jnp.zeros((1, 6), jnp.int32),
      segment_ids=jnp.array([[5, 5, 1, 1, 1, 5]]),
    )
    np.testing.assert_array_equal(context.key_start, [[0, 0, 2, 2, 2, 5]])
    np.testing.assert_array_equal(context.key_end, [[1, 2, 3, 4, 5, 6]])


if __name__ == "__main__":
  absltest.main()
