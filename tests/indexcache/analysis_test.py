# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import analysis, methods, observation
from pallas_kernels import chunking
from tests import tolerances
from tests.indexcache import toy

LENGTH = toy.LENGTH
TOPK = 8


@functools.cache
def toy_batch():
  return toy.random_tokens(seed=3)


@functools.cache
def toy_aux():
  _, aux = toy.forward(toy.config(), toy.full_params(), toy_batch())
  return jax.tree.map(np.asarray, aux)


@functools.cache
def toy_observation():
  return observation.observe(toy.config(), toy.full_params(), toy_batch())


def random_selections(seed, num_layers=3, batch=2, rows=5, k=6, num_keys=17):
  """Ascending rows of distinct keys, some with -1 at the end, one empty."""
  rng = np.random.default_rng(seed)
  stacked = np.full((num_layers, batch, rows, k), -1, np.int32)
  for place in np.ndindex(num_layers, batch, rows):
    count = place[-1] if place[-1] < rows - 1 else k
    stacked[place][:count] = np.sort(rng.permutation(num_keys)[:count])
  return [jnp.asarray(indices) for indices in stacked]


def overlap_loop(topk_indices):
  """[P, B, L, L] in float64, by sets."""
  layers, (batch, rows, _) = len(topk_indices), topk_indices[0].shape
  result = np.zeros((rows, batch, layers, layers))
  for p, b, i, j in np.ndindex(*result.shape):
    one = {*np.asarray(topk_indices[i][b, p]).tolist()} - {-1}
    other = {*np.asarray(topk_indices[j][b, p]).tolist()} - {-1}
    result[p, b, i, j] = len(one & other) / max(len(one), 1)
  return result


class SharedRowsTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 5)
  def test_equals_sets(self, together):
    selections = random_selections(seed=4, rows=11, k=12)
    actual = analysis.shared_rows(selections, together)
    for share, indices in zip(actual, np.asarray(selections), strict=True):
      distinct = selected = 0
      for sequence in indices:
        for first in range(0, 11 - together + 1, together):
          group = [
            set(row.tolist()) - {-1} for row in sequence[first:][:together]
          ]
          distinct += len(set.union(*group))
          selected += sum(map(len, group))
      np.testing.assert_allclose(
        share, distinct / selected, **tolerances.tolerance("float32")
      )

  def test_extremes(self):
    same = jnp.broadcast_to(jnp.arange(6), (2, 8, 6))
    other = jnp.arange(2 * 8 * 6).reshape(2, 8, 6)
    nothing = jnp.full((2, 8, 6), -1)
    np.testing.assert_allclose(
      analysis.shared_rows([same, other, nothing], 4), [0.25, 1, 0]
    )

  def test_refuses_fewer_positions(self):
    with self.assertRaisesRegex(ValueError, "got 9 for 8"):
      analysis.shared_rows([jnp.zeros((1, 8, 2), jnp.int32)], 9)

  def test_a_models(self):
    batches = [toy_batch(), toy.random_tokens(seed=4)]
    shares = analysis.model_shared_rows(
      toy.config(), toy.full_params(), batches, (1, 2)
    )
    observations = [
      observation.observe(toy.config(), toy.full_params(), tokens)
      for tokens in batches
    ]
    expected = np.mean(
      [analysis.shared_rows(x.topk_indices, 2) for x in observations], axis=0
    )
    np.testing.assert_allclose(shares[0], 1)
    np.testing.assert_allclose(shares[1], expected, rtol=1e-6)


def attention_loop(aux, layer, b, t, scale):
  """Logits of each head over the visible keys in float64."""
  query = np.float64(aux.attention_inputs[layer].query[b, t])
  rows = np.float64(aux.attention_inputs[layer].kv_latent[b, : t + 1])
  return scale * query @ rows.T


def softmax(logits):
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


class OverlapTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2)
  def test_equals_a_loop_over_sets(self, seed):
    topk_indices = random_selections(seed)
    expected = overlap_loop(topk_indices)
    tolerance = tolerances.tolerance("float32", 10)
    np.testing.assert_allclose(
      analysis.topk_overlap(topk_indices), expected.mean((0, 1)), **tolerance
    )
    np.testing.assert_allclose(
      analysis.topk_overlap(topk_indices, per_position=True),
      expected.mean(1),
      **tolerance,
    )

  def test_literal(self):
    one = jnp.array([[[0, 3, 5, 9]]])
    two = jnp.array([[[3, 5, 7, 8]]])
    short = jnp.array([[[9, -1, -1, -1]]])
    np.testing.assert_array_equal(
      analysis.topk_overlap([one, two, short]),
      [[1.0, 0.5, 0.25], [0.5, 1.0, 0.0], [1.0, 0.0, 1.0]],
    )

  def test_chunks_change_nothing(self):
    topk_indices = random_selections(4)
    expected = analysis.topk_overlap(topk_indices)
    jax.clear_caches()
    with mock.patch.object(chunking, "CHUNK_BYTES", 400):
      chunked = analysis.topk_overlap(topk_indices)
    jax.clear_caches()
    np.testing.assert_array_equal(chunked, expected)

  def test_nothing_selected_at_all(self):
    nothing = jnp.full((1, 2, 3), -1, jnp.int32)
    np.testing.assert_array_equal(
      analysis.topk_overlap([nothing, nothing]), np.zeros((2, 2))
    )

  def test_memory_holds_no_array_of_queries_by_keys(self):
    length = 1 << 16
    indices = jax.ShapeDtypeStruct((1, length, 4), jnp.int32)
    stacked = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.int32)
    lowered = analysis._overlap_row.lower(indices, stacked, length)
    stats = lowered.compile().memory_analysis()
    # One T x S float32 array would be 16 GiB.
    self.assertLess(stats.temp_size_in_bytes, 2**30)


class ModelTest(parameterized.TestCase):
  def test_observes_the_models_own_selections(self):
    seen, aux = toy_observation(), toy_aux()
    for layer in range(4):
      np.testing.assert_array_equal(
        seen.topk_indices[layer], aux.topk_indices[layer][:, TOPK:]
      )
    np.testing.assert_array_equal(seen.key_end[0], np.arange(TOPK, LENGTH) + 1)

  def test_overlap_averages_the_informative_queries(self):
    expected = overlap_loop([x[:, TOPK:] for x in toy_aux().topk_indices])
    overlap = analysis.model_overlap(
      toy.config(), toy.full_params(), [toy_batch()]
    )
    np.testing.assert_allclose(
      overlap, expected.mean((0, 1)), **tolerances.tolerance("float32", 64)
    )
    self.assertLess(overlap[1, 0], 1)
    np.testing.assert_array_equal(np.diag(overlap), np.ones(4))
    np.testing.assert_allclose(overlap, overlap.T, rtol=1e-6)

  def test_at_positions(self):
    # As many as the default, which spares compiling the model again.
    positions = tuple(reversed(range(TOPK, LENGTH)))
    expected = overlap_loop([x[:, positions] for x in toy_aux().topk_indices])
    arguments = (toy.config(), toy.full_params(), [toy_batch()], positions)
    np.testing.assert_allclose(
      analysis.model_overlap(*arguments),
      expected.mean(1),
      **tolerances.tolerance("float32", 8),
    )
    recall = analysis.model_recall(*arguments)
    self.assertEqual(recall.shape, (LENGTH - TOPK, 4, 4))
    expected = recall_loop(positions)
    np.testing.assert_allclose(
      recall, expected.mean(1), **tolerances.tolerance("float32", 32)
    )

  def test_recall_equals_a_loop(self):
    recall = analysis.model_recall(
      toy.config(), toy.full_params(), [toy_batch()]
    )
    np.testing.assert_allclose(
      recall,
      recall_loop(range(TOPK, LENGTH)).mean((0, 1)),
      **tolerances.tolerance("float32", 32),
    )
    self.assertBetween(recall.min(), 0, 1)

  def test_recall_of_all_keys_is_one(self):
    config = toy.config()
    seen = toy_observation()
    everything = jnp.broadcast_to(
      jnp.arange(LENGTH, dtype=jnp.int32), (*seen.key_end.shape, LENGTH)
    )
    seen = seen._replace(topk_indices=(everything,) * 4)
    np.testing.assert_allclose(
      analysis.attention_recall(seen, scale=config.attention_scale),
      np.ones((4, 4)),
      **tolerances.tolerance("float32", LENGTH),
    )

  def test_recall_counts_no_padding(self):
    config = toy.config()
    seen = toy_observation()
    nothing = jnp.full_like(seen.topk_indices[0], -1)
    seen = seen._replace(topk_indices=(nothing,) * 4)
    np.testing.assert_array_equal(
      analysis.attention_recall(seen, scale=config.attention_scale),
      np.zeros((4, 4)),
    )

  def test_batches_are_averaged(self):
    config, params = toy.config(), toy.full_params()
    batches = [toy_batch(), toy.random_tokens(seed=5)]
    for function in (analysis.model_overlap, analysis.attention_similarity):
      apart = [function(config, params, [tokens]) for tokens in batches]
      np.testing.assert_allclose(
        function(config, params, np.stack(batches)),
        np.mean(apart, axis=0),
        rtol=1e-6,
      )

  def test_similarity_equals_a_loop(self):
    config, params, aux = toy.config(), toy.full_params(), toy_aux()
    expected = np.zeros((4, 4))
    for layer in range(4):
      outputs = [
        outputs_loop(config, params, aux, layer, source)
        for source in range(layer + 1)
      ]
      for source, other in enumerate(outputs):
        own = outputs[layer]
        norms = np.linalg.norm(own, axis=-1) * np.linalg.norm(other, axis=-1)
        expected[layer, source] = np.mean((own * other).sum(-1) / norms)
    similarity = analysis.attention_similarity(config, params, [toy_batch()])
    np.testing.assert_allclose(
      similarity, expected, **tolerances.tolerance("float32", 64)
    )
    self.assertLess(similarity[3, 0], 0.999)

  def test_similarity_serves_dynamic_programming(self):
    config = toy.config()
    results = ic.METHODS["dynamic_programming"](
      methods.SearchProblem(
        loss_fn=lambda _: 0.0,
        num_layers=4,
        similarity=lambda: analysis.attention_similarity(
          config, toy.full_params(), [toy_batch()]
        ),
      ),
      [2],
    )
    self.assertEqual(results[2].schedule.num_full, 2)

  def test_needs_an_indexer_in_every_layer(self):
    config = toy.config("FSFF")
    with self.assertRaisesRegex(ValueError, "all full.*'FSFF'"):
      observation.observe(config, toy.params_for(config), toy_batch())

  @parameterized.parameters(([7],), ([LENGTH],), ([],))
  def test_uninformative_positions(self, positions):
    with self.assertRaisesRegex(ValueError, "more than index_topk=8.*of 40"):
      observation.observe(
        toy.config(), toy.full_params(), toy_batch(), positions
      )

  def test_sequences_that_select_every_key(self):
    with self.assertRaisesRegex(ValueError, r"got \[\] of 8 tokens.*longer"):
      observation.observe(
        toy.config(), toy.full_params(), toy_batch()[:, :TOPK]
      )

  def test_needs_a_batch(self):
    with self.assertRaisesRegex(ValueError, "at least one batch"):
      analysis.model_overlap(toy.config(), toy.full_params(), [])


def recall_loop(positions):
  """[P, B, L, L] in float64."""
  aux, scale = toy_aux(), toy.config().attention_scale
  result = np.zeros((len(positions), 2, 4, 4))
  for place, b, i in np.ndindex(len(positions), 2, 4):
    t = positions[place]
    probs = softmax(attention_loop(aux, i, b, t, scale)).mean(0)
    for j in range(4):
      indices = aux.topk_indices[j][b, t]
      result[place, b, i, j] = probs[indices[indices >= 0]].sum()
  return result


def outputs_loop(config, params, aux, layer, source):
  """[B, P, N v] in float64: the heads under the source's indices."""
  kernel = params[f"layers_{layer}"]["self_attn"]["kv_b_proj"]["kernel"]
  value_up = np.float64(kernel).reshape(
    config.kv_lora_rank, config.num_attention_heads, -1
  )[..., config.qk_nope_head_dim :]
  outputs = []
  for b in range(2):
    for t in range(TOPK, LENGTH):
      keys = aux.topk_indices[source][b, t]
      logits = attention_loop(aux, layer, b, t, config.attention_scale)
      rows = np.float64(aux.attention_inputs[layer].kv_latent[b, keys])
      attended = softmax(logits[:, keys]) @ rows[:, : config.kv_lora_rank]
      outputs.append(np.einsum("nv,vnd->nd", attended, value_up).ravel())
  return np.reshape(outputs, (2, LENGTH - TOPK, -1))


if __name__ == "__main__":
  absltest.main()
