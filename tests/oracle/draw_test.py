# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json

from absl.testing import absltest, parameterized

import indexcache_jax as ic
from tests.oracle import draw


class DrawTest(parameterized.TestCase):
  def test_a_seed_gives_the_same_cases_and_another_others(self):
    self.assertEqual(draw.draw_cases(3, 30), draw.draw_cases(3, 30))
    self.assertNotEqual(draw.draw_cases(3, 30), draw.draw_cases(4, 30))

  @parameterized.parameters(range(20))
  def test_thirty_cases_cover_every_property(self, seed):
    cases = draw.draw_cases(seed, 30)
    configs = [case["config"] for case in cases]
    self.assertEqual(json.loads(json.dumps(cases)), cases)
    self.assertLen({case["name"] for case in cases}, 30)
    self.assertLen({case["seed"] for case in cases}, 30)
    self.assertEqual(
      {config["model_type"] for config in configs},
      {"glm_moe_dsa", "deepseek_v32"},
    )
    self.assertEqual(
      {(config["n_group"], config["topk_group"]) for config in configs},
      {(1, 1), (2, 1), (4, 2)},
    )
    self.assertEqual(
      {config["rope_parameters"]["rope_type"] for config in configs},
      {"default", "yarn"},
    )
    for notation in ("indexer_types", "index_topk_pattern", "index_topk_freq"):
      self.assertTrue(any(notation in config for config in configs), notation)

  @parameterized.parameters(range(20))
  def test_contexts_lie_on_both_sides_of_index_topk(self, seed):
    kinds = set()
    for case in draw.draw_cases(seed, 30):
      topk, (length,) = case["config"]["index_topk"], case["lengths"]
      self.assertGreaterEqual(case["config"]["index_n_heads"], 16)
      self.assertTrue(length <= topk or length > 4 * topk)
      kinds.add(length <= topk)
    self.assertEqual(kinds, {True, False})

  @parameterized.parameters(range(20))
  def test_rule_shares_a_layer(self, seed):
    for case in draw.draw_cases(seed, 30):
      if "index_topk_freq" in case["config"]:
        schedule = ic.ReuseSchedule.from_hf(case["config"])
        self.assertGreater(schedule.num_shared, 0)


if __name__ == "__main__":
  absltest.main()
