# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import functools

import jax
from absl.testing import absltest

import indexcache_jax as ic
from indexcache_jax import text


@functools.lru_cache
def checkpoint():
  return ic.load_checkpoint(ic.embedded_checkpoint())


@functools.lru_cache
def layerwise_loss():
  config, params = checkpoint()
  _, held_out = text.split_files(text.standard_library_files())
  tokens = text.load_tokens(held_out, text.encode_bytes)
  windows = text.spread_windows(tokens, 4, 512)
  return ic.LayerwiseLoss(config, params, windows[None])


class EmbeddedModelTest(absltest.TestCase):
  def test_is_the_small_preset(self):
    config, params = checkpoint()
    small = ic.PRESETS["small"]()
    self.assertEqual(config.schedule, ic.ReuseSchedule.all_full(12))
    for field in ("vocab_size", "hidden_size", "index_topk", "index_n_heads"):
      self.assertEqual(getattr(config, field), getattr(small, field), field)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    self.assertBetween(num_params, 5.4e6, 5.6e6)

  def test_comes_in_less_than_25_mb(self):
    folder = ic.embedded_checkpoint()
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    self.assertContainsSubset(["config.json", "model.safetensors"], files)
    self.assertLess(sum(files.values()), 25e6)

  def test_has_learnt_text_that_it_has_not_seen(self):
    # A uniform guess of a byte costs 5.5 nats.
    self.assertLess(layerwise_loss()(ic.ReuseSchedule.all_full(12)), 1.0)

  def test_its_indexers_differ(self):
    # Layer 2 needs its own: a search that shared it would be wrong.
    full = ic.ReuseSchedule.all_full(12)
    loss_fn = layerwise_loss()
    loss_fn.set_base(full)
    self.assertGreater(loss_fn(full.flip(2)), loss_fn(full) + 0.1)


if __name__ == "__main__":
  absltest.main()
