# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import evaluation, needles
from tests import tolerances
from tests.indexcache import toy


class HeldOutLossTest(parameterized.TestCase):
  @parameterized.parameters("FFFF", "FSSF")
  def test_equals_the_layerwise_loss(self, pattern):
    config = toy.config(pattern)
    batches = np.stack([toy.random_tokens(seed=seed) for seed in (3, 4)])
    layerwise = ic.LayerwiseLoss(toy.config(), toy.full_params(), batches)
    loss = evaluation.held_out_loss(config, toy.params_for(config), batches)
    self.assertIsInstance(loss, float)
    np.testing.assert_allclose(
      loss,
      layerwise(config.schedule),
      **tolerances.tolerance("float32", 32 * 4),
    )


class NeedleRecallTest(parameterized.TestCase):
  @parameterized.parameters(
    # The wrong place of each row's answer, None for a right answer; recall in
    # all and at each depth. Rows 0, 3 and 5 have depth 0, row 2 has depth 1.
    ((None,) * 6, 1.0, (1.0, 1.0, 1.0)),
    ((0, 1, 2, 3, 0, 3), 0.0, (0.0, 0.0, 0.0)),
    ((None, None, 0, None, None, None), 5 / 6, (1.0, 1.0, 0.0)),
    ((3, None, None, 0, 1, None), 0.5, (1 / 3, 0.5, 1.0)),
  )
  def test_counts_what_the_model_would_generate(self, wrong, exact, shares):
    config = toy.config("FSFS")
    params = toy.params_for(config)
    prompts = np.asarray(toy.random_tokens(6, 30, seed=9))
    answers = ic.generate(
      config, params, prompts.tolist(), max_new_tokens=4
    ).copy()
    for row, place in enumerate(wrong):
      if place is not None:
        answers[row, place] = (answers[row, place] + 1) % config.vocab_size
    batch = needles.NeedleBatch(
      prompts, answers, np.array([0, 0.5, 1, 0, 0.5, 0], np.float32)
    )
    # The last of its batches is not full.
    recall = evaluation.needle_recall(config, params, batch, batch_size=4)
    self.assertAlmostEqual(recall.exact, exact)
    self.assertEqual([depth for depth, _ in recall.by_depth], [0.0, 0.5, 1.0])
    np.testing.assert_allclose(
      [share for _, share in recall.by_depth],
      shares,
      **tolerances.tolerance("float64"),
    )


if __name__ == "__main__":
  absltest.main()
