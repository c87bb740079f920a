# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
from absl.testing import absltest

import indexcache_jax as ic
from tests import tolerances
from tests.indexcache import toy


def batches():
  return np.stack([toy.random_tokens(seed=seed) for seed in (3, 4)])


class LayerwiseLossTest(absltest.TestCase):
  def test_equals_the_whole_models_loss(self):
    loss_fn = ic.LayerwiseLoss(toy.config(), toy.full_params(), batches())
    for pattern in ("FFFF", "FSSF"):
      config = toy.config(pattern)
      losses = []
      for tokens in batches():
        logits, _ = toy.forward(config, toy.params_for(config), tokens)
        losses.append(np.mean(ic.next_token_losses(logits, tokens)))
      np.testing.assert_allclose(
        loss_fn(config.schedule),
        np.mean(losses),
        **tolerances.tolerance("float32", 32 * 4),
      )

  def test_a_kept_prefix_changes_no_bit(self):
    fresh = ic.LayerwiseLoss(toy.config(), toy.full_params(), batches())
    reusing = ic.LayerwiseLoss(toy.config(), toy.full_params(), batches())
    for base, candidates in (
      ("FFFF", ("FSFF", "FFSF", "FFFS", "FFFF")),
      ("FFSF", ("FSSF", "FFSS")),
      ("FSSF", ("FSSS",)),
    ):
      reusing.set_base(ic.ReuseSchedule.from_pattern(base))
      for pattern in candidates:
        schedule = ic.ReuseSchedule.from_pattern(pattern)
        self.assertEqual(reusing(schedule), fresh(schedule), pattern)
    self.assertLess(reusing.layer_forwards, fresh.layer_forwards)

  def test_counts_layer_forwards(self):
    loss_fn = ic.LayerwiseLoss(toy.config(), toy.full_params(), batches())
    loss_fn.set_base(ic.ReuseSchedule.from_pattern("FFFF"))
    self.assertEqual(loss_fn.layer_forwards, 4)
    loss_fn(ic.ReuseSchedule.from_pattern("FFSF"))
    self.assertEqual(loss_fn.layer_forwards, 6)
    loss_fn(ic.ReuseSchedule.from_pattern("FFFF"))
    self.assertEqual(loss_fn.layer_forwards, 6)

  def test_needs_an_indexer_in_every_layer(self):
    config = toy.config("FSFF")
    with self.assertRaisesRegex(ValueError, "all full.*'FSFF'"):
      ic.LayerwiseLoss(config, toy.params_for(config), batches())


if __name__ == "__main__":
  absltest.main()
