# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which tests run, and in what order they start."""

import importlib.util
import pathlib

from absl.testing import absltest

from tests.gpu import sharding


class ShardsTest(absltest.TestCase):
  def test_every_op_has_tests_and_every_shard_runs_once(self):
    shards = sharding.shards(list(sharding.TESTED))
    self.assertLen(set(shards), len(shards))
    for shard in shards:
      self.assertIsNotNone(
        importlib.util.find_spec(f"tests.gpu.{shard.module}")
      )
      siblings = [s.index for s in shards if s.module == shard.module]
      self.assertEqual(siblings, list(range(shard.total)))

  def test_no_module_is_left_out(self):
    folder = pathlib.Path(sharding.__file__).parent
    needing_a_gpu = {
      path.stem
      for path in folder.glob("*_test.py")
      if "\ndef setUpModule" in path.read_text(encoding="utf-8")
    }
    shards = sharding.shards(list(sharding.TESTED))
    self.assertEqual({shard.module for shard in shards}, needing_a_gpu)

  def test_longest_first(self):
    shards = sharding.shards(["grouped", "topk", "indexer"])
    self.assertEqual(shards[0], ("indexer_device_test", 0, 3))
    self.assertEqual(shards[-1].total, 1)

  def test_unknown_op(self):
    with self.assertRaisesRegex(ValueError, "`--ops` must be.*got 'top'"):
      sharding.shards(["top"])


if __name__ == "__main__":
  absltest.main()
