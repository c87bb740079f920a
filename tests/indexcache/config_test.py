# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import math

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import rope


class PresetsTest(parameterized.TestCase):
  @parameterized.parameters(*ic.PRESETS)
  def test_builds(self, name):
    config = ic.PRESETS[name]()
    self.assertEqual(config.schedule.num_layers, config.num_hidden_layers)
    self.assertGreaterEqual(config.index_n_heads, 16)

  def test_published_figures(self):
    deepseek = ic.PRESETS["deepseek_v32"]()
    self.assertEqual(deepseek.latent_dim, 576)
    self.assertFalse(deepseek.indexer_rope_interleave)
    # 192^-0.5 times (0.1 ln 40 + 1)^2.
    self.assertAlmostEqual(
      deepseek.attention_scale, 192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    )
    glm = ic.PRESETS["glm_5_2"]()
    self.assertEqual(glm.schedule.num_full, 21)
    self.assertEqual(glm.schedule.full_layers[:4], (0, 1, 2, 6))
    self.assertTrue(glm.indexer_rope_interleave)
    self.assertAlmostEqual(glm.attention_scale, 256**-0.5)
    self.assertEqual(
      ic.PRESETS["glm_47_flash_dsa"]().mlp_layer_types.count("dense"), 1
    )


class ConfigErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"hidden_size": 0}, "`hidden_size` must be positive and finite: got 0"),
    ({"model_type": "llama"}, "`model_type` must be .*got 'llama'"),
    ({"qk_rope_head_dim": 7}, "`qk_rope_head_dim` must be even.*got 7"),
    ({"index_head_dim": 4}, "index_head_dim=4, qk_rope_head_dim=8"),
    ({"n_group": 3}, "`n_group` must divide.*n_routed_experts=8, n_group=3"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok=5, topk_group=2"),
    ({"mlp_layer_types": ("dense",)}, "each of the 4 layers: got 1 entries"),
    (
      {"schedule": ic.ReuseSchedule.from_pattern("FS")},
      "got 2 entries .'FS'. for num_hidden_layers=4",
    ),
  )
  def test_says_the_rule_and_the_values(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      ic.PRESETS["tiny"]().replace(**changes)

  def test_another_depth_drops_what_has_the_old_length(self):
    config = ic.PRESETS["tiny"]().replace(num_hidden_layers=6)
    self.assertEqual(config.schedule.pattern, "FFFFFF")
    self.assertLen(config.mlp_layer_types, 6)

  def test_what_follows_from_a_field_changes_with_it(self):
    config = ic.PRESETS["tiny"]()
    dense = config.replace(first_k_dense_replace=3)
    self.assertEqual(dense.mlp_layer_types, ("dense",) * 3 + ("sparse",))
    given = ("sparse",) * 4
    self.assertEqual(
      config.replace(
        first_k_dense_replace=3, mlp_layer_types=given
      ).mlp_layer_types,
      given,
    )
    other = config.replace(model_type="deepseek_v32")
    self.assertTrue(config.indexer_rope_interleave)
    self.assertFalse(other.indexer_rope_interleave)

  def test_rope_errors(self):
    with self.assertRaisesRegex(ValueError, "'default' or 'yarn': got 'ntk'"):
      ic.RopeConfig(rope_type="ntk")
    with self.assertRaisesRegex(ValueError, "must be given with.*got None"):
      ic.RopeConfig(rope_type="yarn", factor=4.0)


class RopeTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_products_depend_on_the_distance_alone(self, interleave):
    rng = np.random.default_rng(0)
    query, key = jnp.asarray(rng.normal(size=(2, 1, 1, 8)), jnp.float32)

    def product(i, j):
      rotated = [
        rope.rotate(
          x[None],
          rope.rotary(ic.RopeConfig(), 8, jnp.full((1, 1), place)),
          interleave=interleave,
        )
        for x, place in ((query[0], i), (key[0], j))
      ]
      return float(jnp.sum(rotated[0] * rotated[1]))

    self.assertAlmostEqual(product(9, 4), product(25, 20), places=4)
    self.assertNotAlmostEqual(product(9, 4), product(9, 5), places=3)

  def test_layouts_pair_other_dimensions(self):
    tables = rope.rotary(ic.RopeConfig(), 4, jnp.full((1, 1), 1))
    x = jnp.array([[[1.0, 0.0, 0.0, 0.0]]])
    for interleave in (True, False):
      y = rope.rotate(x, tables, interleave=interleave)[0, 0]
      np.testing.assert_allclose(
        y, [math.cos(1), 0, math.sin(1), 0], rtol=1e-6, atol=1e-7
      )
    x = jnp.array([[[0.0, 1.0, 0.0, 0.0]]])
    y = rope.rotate(x, tables, interleave=True)[0, 0]
    np.testing.assert_allclose(y, [-math.sin(1), 0, math.cos(1), 0], rtol=1e-6)
    y = rope.rotate(x, tables, interleave=False)[0, 0]
    np.testing.assert_allclose(
      y, [0, math.cos(0.01), 0, math.sin(0.01)], rtol=1e-6
    )

  def test_yarn_keeps_fast_and_stretches_slow_dimensions(self):
    plain = ic.RopeConfig(rope_theta=10000.0)
    yarn = ic.PRESETS["deepseek_v32"]().rope
    ratio = rope.inverse_frequencies(plain, 64) / rope.inverse_frequencies(
      yarn, 64
    )
    np.testing.assert_allclose(ratio[:10], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[-8:], 40, rtol=1e-5)
    self.assertTrue(np.all(np.diff(ratio) >= -1e-5))
    self.assertEqual(yarn.embedding_scale, 1.0)


if __name__ == "__main__":
  absltest.main()
