# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import costs
from tests.indexcache import toy


class IndexerCostsTest(absltest.TestCase):
  def test_glm_5(self):
    indexer = costs.indexer_costs(ic.PRESETS["glm_5"]())
    # 2048 x 4096 + 6144 x 128 + 6144 x 32 + 256: the 9.37M of its checkpoint.
    self.assertEqual(indexer.parameters, 8388608 + 786432 + 196608 + 256)
    self.assertEqual(indexer.projection_flops, 2 * (indexer.parameters - 256))
    self.assertEqual(indexer.score_flops, 2 * 32 * 128)
    self.assertEqual(indexer.key_bytes, 256)

  def test_parameters_are_the_models(self):
    params = jax.eval_shape(
      ic.SparseTransformer(toy.config()).init,
      jax.random.key(0),
      toy.random_tokens(),
    )["params"]
    layer = params["layers_0"]["self_attn"]["indexer"]
    sizes = [leaf.size for leaf in jax.tree.leaves(layer)]
    indexer = costs.indexer_costs(toy.config())
    self.assertEqual(indexer.parameters, sum(sizes))


class ScheduleCostsTest(parameterized.TestCase):
  def test_glm_52_saves_57_of_78(self):
    config = ic.PRESETS["glm_5_2"]()
    result = costs.schedule_costs(config, context=200_000, key_bytes=132)
    self.assertAlmostEqual(result.indexer_compute_removed, 57 / 78)
    self.assertAlmostEqual(result.index_key_bytes_removed, 57 / 78)
    full = ic.ReuseSchedule.all_full(78)
    before = costs.schedule_costs(config, full, context=200_000, key_bytes=132)
    # 7,524 bytes a token, as SGLang's documentation of GLM-5.2 has it.
    self.assertEqual(before.index_key_bytes - result.index_key_bytes, 7524)
    self.assertEqual(before.cache_bytes - result.cache_bytes, 7524)
    self.assertEqual(
      before.indexer_parameters - result.indexer_parameters, 57 * 9371904
    )
    self.assertEqual(result.prefill.indexer_all_full, before.prefill.indexer)
    self.assertAlmostEqual(
      result.decode.ratio, before.decode.total / result.decode.total
    )

  def test_glm_52_at_a_million_tokens(self):
    # zai-org's announcement: FLOPs a token down 2.9 times at 1M.
    config = ic.PRESETS["glm_5_2"]()
    result = costs.schedule_costs(config, context=1 << 20)
    self.assertBetween(result.decode.ratio, 2.6, 3.2)

  def test_one_in_four_saves_three_quarters(self):
    config = toy.config().replace(num_hidden_layers=16)
    schedule = ic.ReuseSchedule.uniform(16, every=4)
    result = costs.schedule_costs(config, schedule, context=1024)
    self.assertEqual(result.indexer_compute_removed, 0.75)
    self.assertEqual(result.index_key_bytes_removed, 0.75)
    self.assertEqual(
      result.prefill.indexer * 4, result.prefill.indexer_all_full
    )

  def test_by_hand(self):
    config = toy.config("FSSF", mlp_layer_types=("dense", *["sparse"] * 3))
    result = costs.schedule_costs(config, context=10)
    # wq_b 24 x 256, wk 32 x 16, weights_proj 32 x 16; scores 2 x 16 x 16.
    projections = 2 * (24 * 256 + 32 * 16 + 32 * 16)
    self.assertEqual(result.decode.indexer, 2 * (projections + 10 * 512))
    self.assertEqual(result.prefill.indexer, 2 * (10 * projections + 55 * 512))
    # 2 heads, rows of 24 and values of 16, 8 keys; prefill 1 + ... + 8 + 8 + 8.
    self.assertEqual(result.decode.attention, 4 * 2 * 2 * 40 * 8)
    self.assertEqual(result.prefill.attention, 4 * 2 * 2 * 40 * (36 + 16))
    attention = 2 * (
      32 * 24 + 32 * 24  # q_a_proj, kv_a_proj_with_mqa
      + 24 * 2 * 20  # q_b_proj
      + 2 * 16 * 12 + 2 * 16 * 10  # kv_b_proj, to queries and outputs
      + 2 * 10 * 32  # o_proj
    )  # fmt: skip
    dense = 6 * 32 * 48
    sparse = 6 * 32 * 16 * 3 + 2 * 32 * 8
    layers = 4 * attention + dense + 3 * sparse
    self.assertEqual(result.decode.rest, layers + 2 * 32 * 64)
    self.assertEqual(result.prefill.rest, 10 * layers + 2 * 32 * 64)

  @parameterized.parameters(1, 7, 8, 9, 40)
  def test_prefill_attention_is_the_sum_over_queries(self, context):
    config = toy.config()
    whole = costs.schedule_costs(config, context=context).prefill.attention
    steps = [
      costs.schedule_costs(config, context=t + 1).decode.attention
      for t in range(context)
    ]
    self.assertEqual(whole, sum(steps))

  def test_bytes_are_the_caches(self):
    config = toy.config("FSSF", dtype=jnp.bfloat16)
    cache = ic.init_cache(config, 1, 16)
    result = costs.schedule_costs(config, context=16)
    self.assertEqual(16 * result.cache_bytes, cache.num_bytes)

  @parameterized.parameters(("FFF", 4), ("FFFF", 0))
  def test_impossible(self, pattern, context):
    schedule = ic.ReuseSchedule.from_pattern(pattern)
    with self.assertRaisesRegex(
      ValueError,
      f"{len(pattern)} entries for num_hidden_layers=4, context={context}",
    ):
      costs.schedule_costs(toy.config(), schedule, context=context)


if __name__ == "__main__":
  absltest.main()
