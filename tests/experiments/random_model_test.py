# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
from absl.testing import absltest

import indexcache_jax as ic
from experiments import random_model
from indexcache_jax import presets


class BalanceTest(absltest.TestCase):
  def test_experts_share_the_tokens_and_nothing_else_changes(self):
    config = presets.PRESETS["tiny"]().replace(
      schedule=ic.ReuseSchedule.all_full(4)
    )
    params = random_model.random_params(config)
    untouched, before = random_model.balance_experts(
      config, params, num_tokens=512, num_steps=0
    )
    balanced, after = random_model.balance_experts(
      config, params, num_tokens=512
    )
    self.assertLen(after, 3)
    self.assertGreater(before.max(), 2)
    self.assertLess(after.max(), 1.1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(balanced):
      is_bias = "e_score_correction_bias" in jax.tree_util.keystr(path)
      same = np.array_equal(leaf, _at(untouched, path))
      self.assertEqual(same, not is_bias, path)
      self.assertTrue(np.array_equal(_at(params, path), _at(untouched, path)))


def _at(tree, path):
  for entry in path:
    tree = tree[entry.key]
  return tree


if __name__ == "__main__":
  absltest.main()
