# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""8-bit index keys."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import costs, generation
from tests import tolerances
from tests.indexcache import toy

_DTYPE = jnp.float8_e4m3fn


class QuantizedKeysTest(parameterized.TestCase):
  def test_chunks_and_tokens_give_the_logits_of_one_pass(self):
    config = toy.config("FSSF", index_key_dtype=_DTYPE)
    params, tokens = toy.params_for(config), toy.random_tokens()
    expected, aux = toy.forward(config, params, tokens)
    cache = ic.init_cache(config, 2, toy.LENGTH)
    logits, cache = generation.prefill(
      ic.SparseTransformer(config),
      params,
      np.asarray(tokens[:, :-1]),
      np.full(2, toy.LENGTH - 1),
      cache,
      chunk_size=15,
    )
    tolerance = tolerances.tolerance("float32", 32 * 4)
    np.testing.assert_allclose(logits, expected[:, -2], **tolerance)
    logits, last = toy.forward(config, params, tokens[:, -1:], cache=cache)
    np.testing.assert_allclose(logits[:, 0], expected[:, -1], **tolerance)
    self.assertEqual(last.cache.index_keys[1].dtype, _DTYPE)
    for whole, step in zip(aux.topk_indices, last.topk_indices, strict=True):
      np.testing.assert_array_equal(whole[:, -1:], step)

  def test_most_selected_keys_are_those_of_float32(self):
    agreement = []
    tokens = toy.random_tokens()
    for dtype in (None, _DTYPE):
      config = toy.config(index_key_dtype=dtype)
      _, aux = toy.forward(config, toy.full_params(), tokens)
      agreement.append(np.asarray(aux.topk_indices[0]))
    exact, rounded = agreement
    self.assertFalse(np.array_equal(exact, rounded))
    shared = [
      len({*a[a >= 0]} & {*b[b >= 0]}) / np.sum(a >= 0)
      for a, b in zip(
        exact.reshape(-1, exact.shape[-1]),
        rounded.reshape(-1, exact.shape[-1]),
        strict=True,
      )
    ]
    # 3 mantissa bits; 8 of 40 keys, so one swapped key is an eighth.
    self.assertGreater(np.mean(shared), 0.95)

  def test_bytes_of_the_cache_are_those_of_the_costs(self):
    config = toy.config("FSSF", index_key_dtype=_DTYPE)
    cache = ic.init_cache(config, 2, 16)
    token = costs.schedule_costs(config, context=16).cache_bytes
    self.assertEqual(token, 4 * 4 * config.latent_dim + 2 * (16 + 4))
    self.assertEqual(cache.num_bytes, 2 * 16 * token)

  @parameterized.parameters(
    ({"index_key_dtype": jnp.int8}, "must be None"),
    (
      {"index_key_dtype": _DTYPE, "index_head_dim": 24},
      "power of two for the Hadamard rotation.*got 24",
    ),
  )
  def test_says_the_rule_and_the_value(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      toy.config(**changes)


if __name__ == "__main__":
  absltest.main()
