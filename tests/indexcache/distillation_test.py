# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import traverse_util

import indexcache_jax as ic
import pallas_kernels
from indexcache_jax import attention, decoder, dense_mla, distillation
from indexcache_jax import model as model_lib
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
  return traverse_util.flatten_dict(grads)


def two_layers():
  """Config and parameters of a model that compiles in no time: no experts."""
  config = toy.config().replace(
    num_hidden_layers=2,
    first_k_dense_replace=2,
    schedule=ic.ReuseSchedule("FS"),
  )
  params = toy.params_for(toy.config("FSSS"))
  second = jax.tree.map(lambda x: x[::-1], params["layers_0"])
  del second["self_attn"]["indexer"]
  parts = ("embed_tokens", "layers_0", "norm", "lm_head")
  return config, {name: params[name] for name in parts} | {"layers_1": second}


def numpy_kl(inputs, state, key_start, key_end, scale, selected, everywhere):
  """KL of row 0 by a float64 loop over the keys that count.

  `selected`: the sum is over the selected keys; `everywhere`: the
  distributions are over all visible ones.
  """
  query, latent = (np.asarray(x[0], np.float64) for x in inputs)
  index_q, index_k, weights = (np.asarray(x[0], np.float64) for x in state[1:])
  result = []
  for t in range(query.shape[0]):
    visible = list(range(int(key_start[0, t]), int(key_end[0, t])))
    counted = visible
    if selected:
      counted = [s for s in np.asarray(state.topk_indices[0, t]) if s >= 0]
    keys = visible if everywhere else counted
    logits = query[t] @ latent[keys].T * scale
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    teacher = (probs / probs.sum(axis=-1, keepdims=True)).mean(axis=0)
    scores = weights[t] @ np.maximum(index_q[t] @ index_k[keys].T, 0)
    log_q = scores - scores.max()
    log_q -= np.log(np.exp(log_q).sum())
    terms = teacher * (np.log(teacher) - log_q)
    result.append(float(np.sum(terms[np.isin(keys, counted)])))
  return result


def masked_teacher(aux, config, layer, mask):
  """Head-averaged attention of a layer over the keys of a mask [B, T, S]."""
  query, latent = jax.lax.stop_gradient(aux.attention_inputs[layer])
  logits = jnp.einsum(
    "btnc,bsc->btns", query, latent, precision=jax.lax.Precision.HIGHEST
  )
  logits = jnp.where(mask[:, :, None], logits * config.attention_scale, -1e9)
  return jnp.mean(jax.nn.softmax(logits), axis=2)


class DistillationTest(parameterized.TestCase):
  @parameterized.parameters(
    ("dense", True), ("sparse", True), ("sparse", False)
  )
  def test_equals_a_float64_loop(self, kind, renormalise):
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
        everywhere=not renormalise,
      )
      np.testing.assert_allclose(
        distillation.layer_kl(aux, config, layer, renormalise=renormalise)[0],
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
    for path, grad in traverse_util.flatten_dict(grads).items():
      if "indexer" in path:
        self.assertFalse(np.any(grad), path)

  @parameterized.parameters(
    ("dense", True), ("sparse", True), ("sparse", False)
  )
  def test_gradient_is_that_of_the_averaged_teacher(self, kind, renormalise):
    # The paper's proposition 1, weighted: one full layer that serves three.
    config, weights = toy.config("FSSS"), (0.4, 0.3, 0.2, 0.1)
    _, aux = toy.forward(
      config, toy.params_for(config), toy.random_tokens(), kind=kind
    )
    topk_indices, *outputs = aux.index_states[0]

    def multi(*outputs):
      state = attention.IndexState(topk_indices, *outputs)
      return distillation.distillation_loss(
        aux._replace(index_states=(state,) * 4),
        config,
        layer_weights=weights,
        renormalise=renormalise,
      )

    def averaged(*outputs):
      scores = pallas_kernels.indexer_scores(
        *outputs, aux.key_start, aux.key_end
      )
      is_visible = is_counted = scores > -jnp.inf
      if kind == "sparse":
        keys = jnp.arange(toy.LENGTH)
        is_counted = jnp.any(topk_indices[..., None] == keys, axis=2)
      mask = is_counted if renormalise else is_visible
      teacher = sum(
        weight * masked_teacher(aux, config, layer, mask)
        for layer, weight in enumerate(weights)
      )
      student = jax.nn.log_softmax(jnp.where(mask, scores, -1e9))
      teacher = jnp.where(is_counted, teacher, 0)
      return jnp.mean(distillation.kl_divergence(student, teacher))

    found, expected = (
      jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*outputs)
      for loss in (multi, averaged)
    )
    for grad, other in zip(found, expected, strict=True):
      self.assertTrue(np.any(other))
      np.testing.assert_allclose(
        grad, other, **tolerances.tolerance("float32", 40 * 16, grads=True)
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

  def test_layer_weights(self):
    config = toy.config("FSFF")
    _, aux = toy.forward(config, toy.params_for(config), toy.random_tokens())
    self.assertEqual(
      distillation.equal_weights(config, multi_layer=True), (0.5, 0.5, 1, 1)
    )
    kls = [
      float(jnp.mean(distillation.layer_kl(aux, config, layer)))
      for layer in range(4)
    ]
    loss = distillation.distillation_loss(
      aux, config, layer_weights=(0.0, 2.0, 1.0, 0.0)
    )
    np.testing.assert_allclose(loss, 2 * kls[1] + kls[2], rtol=1e-6)
    for weights in ((1.0, 1.0), (1.0, 1.0, -1.0, 1.0), (1.0, 1.0, np.nan, 1.0)):
      with self.assertRaisesRegex(
        ValueError, r"`layer_weights` .*one a layer: got \[1.0, 1.0.*layers=4"
      ):
        distillation.distillation_loss(aux, config, layer_weights=weights)

  @parameterized.parameters("dense", "sparse")
  def test_finite_differences_prove_that_no_gradient_crosses(self, kind):
    # Along the indexers the sum of both losses changes as the KL does, along
    # the rest its gradient is the change of the language-model loss, although
    # the KL changes too.
    config, params = two_layers()

    @jax.jit
    def losses(params):
      tokens = toy.random_tokens()
      logits, aux = ic.SparseTransformer(config).apply(
        {"params": params}, tokens, attention_kind=kind
      )
      return (
        jnp.mean(ic.next_token_losses(logits, tokens)),
        distillation.distillation_loss(aux, config),
        aux.topk_indices if kind == "sparse" else (),
      )

    params = traverse_util.flatten_dict(params)
    grads = traverse_util.flatten_dict(
      jax.jit(jax.grad(lambda params: sum(losses(params)[:2])))(
        traverse_util.unflatten_dict(params)
      )
    )

    def differences(is_moved):
      """Of (language-model loss, KL) along the gradient, by its norm."""
      # Larger steps move the selection, and there the losses jump.
      size = 1e-4
      moved = {path: grads[path] for path in grads if is_moved(path)}
      norm = optax.tree.norm(moved)

      def at(sign):
        step = {path: sign * size * x / norm for path, x in moved.items()}
        return losses(
          traverse_util.unflatten_dict(
            {path: x + step.get(path, 0) for path, x in params.items()}
          )
        )

      ahead, behind = at(1), at(-1)
      jax.tree.map(np.testing.assert_array_equal, ahead[2], behind[2])
      pairs = zip(ahead[:2], behind[:2], strict=True)
      changes = [float(a - b) / (2 * size) for a, b in pairs]
      return np.array(changes) / float(norm)

    def is_indexer(path):
      return "indexer" in path

    language, kl = differences(is_indexer)
    np.testing.assert_allclose([language, kl], [0, 1], atol=0.01)
    language, kl = differences(lambda path: not is_indexer(path))
    np.testing.assert_allclose(language, 1, atol=0.01)
    self.assertGreater(abs(kl), 0.002)

  def test_recomputation_replays_the_same_indices(self):
    (config, params), selections = two_layers(), []
    select = attention.indexer_topk

    def recording(*args, **kwargs):
      indices = select(*args, **kwargs)
      jax.debug.callback(lambda x: selections.append(np.asarray(x)), indices)
      return indices

    def loss(params, wrap):
      """The model's loop, each layer wrapped."""
      context = attention.make_context(config, toy.random_tokens())
      hidden = ic.SparseTransformer(config).apply(
        {"params": params}, toy.random_tokens(), method="embed"
      )
      index, total = None, 0.0
      for layer in range(2):
        block = decoder.DecoderLayer(config, config.is_sparse_mlp(layer))

        @wrap
        def run(params, hidden, index, block=block, layer=layer):
          hidden, index, _, inputs = block.apply(
            {"params": params},
            *(hidden, context, index, None, config.schedule.is_full(layer)),
          )
          return (
            hidden,
            index,
            distillation.selected_index_kl(inputs, index, config),
          )

        hidden, index, kl = run(params[f"layers_{layer}"], hidden, index)
        total += jnp.mean(kl)
      return total + jnp.mean(hidden**2)

    with mock.patch.object(attention, "indexer_topk", recording):
      kept, recomputed = (
        jax.jit(jax.grad(functools.partial(loss, wrap=wrap)))(params)
        for wrap in (lambda run: run, jax.checkpoint)
      )
      jax.effects_barrier()
    # One full layer: once where kept, twice where recomputed.
    self.assertLen(selections, 3)
    self.assertLen({indices.tobytes() for indices in selections}, 1)
    jax.tree.map(
      functools.partial(
        np.testing.assert_allclose,
        **tolerances.tolerance("float32", toy.LENGTH * 16, grads=True),
      ),
      recomputed,
      kept,
    )

  @parameterized.product(kind=("dense", "sparse"), renormalise=(True, False))
  def test_memory_at_32k(self, kind, renormalise):
    # Of T x S float32 numbers there would be 4 GiB.
    length, config = 1 << 15, toy.config("FS", num_hidden_layers=2)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    heads = config.index_n_heads
    integers = jax.ShapeDtypeStruct((1, length), jnp.int32)
    topk = jax.ShapeDtypeStruct((1, length, config.index_topk), jnp.int32)

    def loss(index, inputs, topk_indices, key_start, key_end):
      state = attention.IndexState(
        topk_indices if kind == "sparse" else None, *index
      )
      aux = model_lib.Aux(
        *((state.topk_indices,) * 2, (state,) * 2, (inputs,) * 2),
        *(key_start, key_end, None),
      )
      return distillation.distillation_loss(
        aux, config, renormalise=renormalise
      )

    compiled = (
      jax.jit(jax.grad(loss))
      .lower(
        (
          shape((1, length, heads, config.index_head_dim)),
          shape((1, length, config.index_head_dim)),
          shape((1, length, heads)),
        ),
        attention.AttentionInputs(
          shape((1, length, config.num_attention_heads, config.latent_dim)),
          shape((1, length, config.latent_dim)),
        ),
        *(topk, integers, integers),
      )
      .compile()
    )
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 1 << 30)

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

  def test_fused_attention_is_chosen_by_the_bounds(self):
    # XLA in cuDNN's place: the choice, the scale and the value's columns.
    rng = np.random.default_rng(2)
    query = jnp.asarray(rng.normal(size=(2, 9, 3, 8)), jnp.float32)
    latent = jnp.asarray(rng.normal(size=(2, 9, 8)), jnp.float32)
    end = jnp.broadcast_to(jnp.arange(1, 10, dtype=jnp.int32), (2, 9))
    packed = jnp.where(jnp.arange(9) < 4, 0, 4) + jnp.zeros_like(end)
    fused = functools.partial(dense_mla._causal, implementation="xla")
    for start, calls in ((jnp.zeros_like(end), 1), (packed, 0)):

      def loss(query, latent, start=start):
        out = dense_mla.dense_mla(
          query, latent, start, end, scale=0.3, value_dim=6
        )
        return jnp.sum(out**2), out

      expected = jax.value_and_grad(loss, (0, 1), has_aux=True)(query, latent)
      ran = []

      def counting(*args, ran=ran, **kwargs):
        jax.debug.callback(lambda: ran.append(1))
        return fused(*args, **kwargs)

      with (
        mock.patch.object(dense_mla, "_suits_cudnn", lambda *_: True),
        mock.patch.object(dense_mla, "_causal", counting),
      ):
        found = jax.value_and_grad(loss, (0, 1), has_aux=True)(query, latent)
        jax.effects_barrier()
      self.assertLen(ran, calls)
      for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
      ):
        np.testing.assert_allclose(
          a, b, **tolerances.tolerance("float32", 9 * 18, grads=True)
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
