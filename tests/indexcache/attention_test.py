# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention against the expanded form, in float64 NumPy loops.

The reference shares no code with the library: keys and values of every head
are made from `kv_b_proj`, and a pair is rotated as a complex number.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import attention, norms
from tests import tolerances
from tests.indexcache import toy

LENGTH = toy.LENGTH
YARN = ic.RopeConfig(
  rope_type="yarn",
  factor=8.0,
  original_max_position_embeddings=16,
  beta_fast=4.0,
  mscale=1.0,
  mscale_all_dim=0.5,
)


def frequencies(rope, dim):
  """Angular frequency of each pair, a dimension at a time."""
  result = []
  for pair in range(dim // 2):
    frequency = rope.rope_theta ** (-2 * pair / dim)
    if rope.rope_type == "yarn":
      low, high = (
        dim
        * math.log(
          rope.original_max_position_embeddings / (turns * 2 * math.pi)
        )
        / (2 * math.log(rope.rope_theta))
        for turns in (rope.beta_fast, rope.beta_slow)
      )
      low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
      stretched = min(max((pair - low) / (high - low), 0), 1)
      frequency *= 1 - stretched + stretched / rope.factor
    result.append(frequency)
  return np.array(result)


def rotated(x, position, config, interleave):
  """One vector, in its own layout."""
  rope = config.rope
  turn = np.exp(1j * position * frequencies(rope, len(x)))
  if rope.rope_type == "yarn":
    turn *= (0.1 * rope.mscale * math.log(rope.factor) + 1) / (
      0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1
    )
  y = np.empty_like(x)
  half = len(x) // 2
  first, second = (
    (slice(0, None, 2), slice(1, None, 2))
    if interleave
    else (slice(0, half), slice(half, None))
  )
  pairs = (x[first] + 1j * x[second]) * turn
  y[first], y[second] = pairs.real, pairs.imag
  return y


def rms_norm(x, scale, eps):
  return x / np.sqrt(np.mean(x**2) + eps) * scale


def linear(x, params):
  return x @ params["kernel"] + params.get("bias", 0)


def query_latent(params, config, hidden):
  return rms_norm(
    linear(hidden, params["q_a_proj"]),
    params["q_a_layernorm"]["scale"],
    config.latent_norm_eps,
  )


def select(params, config, hidden, starts):
  """Visible keys of largest indexer score: a list of lists."""
  indexer = params["indexer"]
  heads, dim = config.index_n_heads, config.index_head_dim
  width = config.qk_rope_head_dim

  def turned(x, position):
    return np.concatenate(
      [
        rotated(x[:width], position, config, config.indexer_rope_interleave),
        x[width:],
      ]
    )

  selection, keys = [], []
  for t, x in enumerate(hidden):
    key = linear(x, indexer["wk"])
    key = (key - key.mean()) / np.sqrt(key.var() + 1e-6)
    key = key * indexer["k_norm"]["scale"] + indexer["k_norm"]["bias"]
    keys.append(turned(key, t - starts[t]))
    query = linear(query_latent(params, config, x), indexer["wq_b"])
    weights = linear(x, indexer["weights_proj"]) * heads**-0.5 * dim**-0.5
    scores = np.zeros(t + 1 - starts[t])
    for head, weight in zip(query.reshape(heads, dim), weights, strict=True):
      head = turned(head, t - starts[t])
      products = np.array(keys[starts[t] :]) @ head
      scores += weight * np.maximum(products, 0)
    best = np.argsort(-scores, kind="stable")[: config.index_topk]
    selection.append(sorted(int(s) + starts[t] for s in best))
  return selection


def expanded_attention(params, config, hidden, starts, selection):
  """MLA with a key and a value for every head, over the selected keys."""
  heads, nope = config.num_attention_heads, config.qk_nope_head_dim
  scale = (nope + config.qk_rope_head_dim) ** -0.5
  if config.rope.rope_type == "yarn":
    scale *= (
      0.1 * config.rope.mscale_all_dim * math.log(config.rope.factor) + 1
    ) ** 2
  keys, values, outputs = [], [], []
  for t, x in enumerate(hidden):
    position = t - starts[t]
    compressed = linear(x, params["kv_a_proj_with_mqa"])
    latent = rms_norm(
      compressed[: config.kv_lora_rank],
      params["kv_a_layernorm"]["scale"],
      config.latent_norm_eps,
    )
    key_rope = rotated(
      compressed[config.kv_lora_rank :], position, config, True
    )
    expanded = linear(latent, params["kv_b_proj"]).reshape(heads, -1)
    keys.append([np.append(head[:nope], key_rope) for head in expanded])
    values.append(expanded[:, nope:])
    query = linear(query_latent(params, config, x), params["q_b_proj"])
    attended = []
    for n, head in enumerate(query.reshape(heads, -1)):
      head = np.append(
        head[:nope], rotated(head[nope:], position, config, True)
      )
      logits = np.array([head @ keys[s][n] for s in selection[t]]) * scale
      probs = np.exp(logits - logits.max())
      probs /= probs.sum()
      attended.append(probs @ [values[s][n] for s in selection[t]])
    outputs.append(linear(np.concatenate(attended), params["o_proj"]))
  return np.array(outputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def attend(config, is_full, kind, params, hidden, segment_ids, index):
  context = attention.make_context(
    config, jnp.zeros(hidden.shape[:2], jnp.int32), segment_ids
  )
  output, state, _, _ = attention.SparseMLA(config).apply(
    {"params": params}, hidden, context, index, None, is_full, kind
  )
  return output, state.topk_indices


def layer_params(use_bias=False):
  params = dict(toy.full_params()["layers_1"]["self_attn"])
  if use_bias:
    for seed, name in enumerate(("q_a_proj", "kv_a_proj_with_mqa", "o_proj")):
      width = params[name]["kernel"].shape[1]
      bias = 0.3 * jax.random.normal(jax.random.key(seed), (width,))
      params[name] = params[name] | {"bias": bias}
  return params


def wide(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def hidden_states():
  return jax.random.normal(jax.random.key(7), (2, LENGTH, 32))


# Row 0 is one sequence, row 1 packs three.
SEGMENT_IDS = np.array([[0] * LENGTH, [4] * 22 + [1] * 3 + [2] * 15], np.int32)
STARTS = [[0] * LENGTH, [0] * 22 + [22] * 3 + [25] * 15]


class SparseMLATest(parameterized.TestCase):
  def assert_equals_expanded(self, output, params, config, selections):
    params = wide(params)
    for row, (starts, selection) in enumerate(
      zip(STARTS, selections, strict=True)
    ):
      expected = expanded_attention(
        params, config, wide(hidden_states()[row]), starts, selection
      )
      np.testing.assert_allclose(
        output[row], expected, **tolerances.tolerance("float32", 32 * 4)
      )

  @parameterized.named_parameters(
    ("interleaved_indexer", {"indexer_rope_interleave": True}),
    ("half_split_indexer", {"indexer_rope_interleave": False}),
    ("yarn", {"rope": YARN}),
    ("yarn_half_split", {"rope": YARN, "indexer_rope_interleave": False}),
    ("other_theta", {"rope": ic.RopeConfig(rope_theta=50.0)}),
    # A large latent epsilon: the layer's norms take it, and no other.
    ("latent_norm_eps", {"latent_norm_eps": 0.1, "rms_norm_eps": 0.5}),
    ("bias", {"attention_bias": True}),
    # No kernel for it here.
    ("shares_rows", {"shares_rows": True}),
  )
  def test_equals_the_expanded_form(self, changes):
    config = toy.config(**changes)
    params = layer_params(config.attention_bias)
    output, topk_indices = attend(
      config, True, "sparse", params, hidden_states(), SEGMENT_IDS, None
    )
    selections = [
      select(wide(params), config, wide(hidden_states()[row]), STARTS[row])
      for row in range(2)
    ]
    for row, selection in enumerate(selections):
      for t, keys in enumerate(selection):
        padded = keys + [-1] * (config.index_topk - len(keys))
        self.assertEqual(topk_indices[row, t].tolist(), padded)
    self.assert_equals_expanded(output, params, config, selections)

  def test_a_shared_layer_attends_to_the_selection_that_it_is_given(self):
    config = toy.config("FSFF")
    params = layer_params()
    del params["indexer"]
    rng = np.random.default_rng(3)
    given = np.full((2, LENGTH, config.index_topk), -1, np.int32)
    selections = [[], []]
    for row in range(2):
      for t, start in enumerate(STARTS[row]):
        visible = np.arange(start, t + 1)
        count = min(len(visible), config.index_topk)
        keys = np.sort(rng.choice(visible, count, replace=False))
        given[row, t, :count] = keys
        selections[row].append(keys.tolist())
    output, topk_indices = attend(
      config,
      False,
      "sparse",
      params,
      hidden_states(),
      SEGMENT_IDS,
      attention.IndexState(jnp.asarray(given)),
    )
    np.testing.assert_array_equal(topk_indices, given)
    self.assert_equals_expanded(output, params, config, selections)

  def test_dense_attends_to_every_visible_key(self):
    config = toy.config(rope=YARN)
    params = layer_params()
    output, topk_indices = attend(
      config, True, "dense", params, hidden_states(), SEGMENT_IDS, None
    )
    self.assertIsNone(topk_indices)
    selections = [
      [list(range(start, t + 1)) for t, start in enumerate(starts)]
      for starts in STARTS
    ]
    self.assert_equals_expanded(output, params, config, selections)


class NormsTest(parameterized.TestCase):
  # Small inputs, where epsilon is as large as their variance.
  SIZES = (1.0, 1e-3)

  def inputs(self, size, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.5, 1, (3, 5, 24)) * size, dtype)
    return x, *rng.normal(size=(2, 24)).astype(np.float32)

  @parameterized.product(
    size=SIZES, eps=(1e-6, 1e-2), dtype=("float32", "bfloat16")
  )
  def test_rms_norm(self, size, eps, dtype):
    x, scale, _ = self.inputs(size, dtype)
    actual = norms.RMSNorm(eps=eps).apply({"params": {"scale": scale}}, x)
    self.assertEqual(actual.dtype, x.dtype)
    x = np.asarray(x, np.float64)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(
      np.asarray(actual, np.float64),
      expected,
      **tolerances.tolerance(dtype, 4),
    )

  @parameterized.product(
    size=SIZES, eps=(1e-6, 1e-2), dtype=("float32", "bfloat16")
  )
  def test_layer_norm_has_a_bias(self, size, eps, dtype):
    x, scale, bias = self.inputs(size, dtype)
    actual = norms.LayerNorm(eps=eps).apply(
      {"params": {"scale": scale, "bias": bias}}, x
    )
    self.assertEqual(actual.dtype, x.dtype)
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred**2, axis=-1, keepdims=True)
    np.testing.assert_allclose(
      np.asarray(actual, np.float64),
      centred / np.sqrt(variance + eps) * scale + bias,
      **tolerances.tolerance(dtype, 4),
    )

  def test_the_indexers_epsilon_is_its_own(self):
    self.assertEqual(norms.LayerNorm().eps, 1e-6)

  def test_a_constant_row_has_no_nan(self):
    x = jnp.zeros((1, 1, 24))
    for norm in (norms.RMSNorm(eps=1e-6), norms.LayerNorm()):
      params = norm.init(jax.random.key(0), x)

      def total(x, norm=norm, params=params):
        return jnp.sum(norm.apply(params, x))

      value, grad = jax.value_and_grad(total)(x)
      self.assertEqual(float(value), 0)
      self.assertTrue(np.all(np.isfinite(grad)))


if __name__ == "__main__":
  absltest.main()
