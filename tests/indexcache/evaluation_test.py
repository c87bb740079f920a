# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import evaluation, long_context_tasks
from tests import tolerances
from tests.indexcache import checkpoints_toy, toy


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


class AccuracyTest(parameterized.TestCase):
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
    batch = long_context_tasks.TaskBatch(
      prompts, answers, np.array([0, 0.5, 1, 0, 0.5, 0], np.float32)
    )
    # Alone and padded, under a static schedule and one of run time. The last
    # of the batches is not full.
    for kwargs in (
      {"config": config, "params": params},
      {
        "config": toy.config(),
        "params": toy.full_params(),
        "schedule": config.schedule,
        "padded_length": 37,
      },
    ):
      found = evaluation.accuracy(batch=batch, batch_size=4, **kwargs)
      self.assertAlmostEqual(found.exact, exact)
      self.assertEqual([depth for depth, _ in found.by_depth], [0.0, 0.5, 1.0])
      np.testing.assert_allclose(
        [share for _, share in found.by_depth],
        shares,
        **tolerances.tolerance("float64"),
      )


class TaskAccuraciesTest(absltest.TestCase):
  def test_every_task_and_length(self):
    tokens = np.arange(3000, dtype=np.int32) % 61
    tasks = long_context_tasks.parse_tasks(["needle", "copying"])
    kwargs = {"depths": [0.0, 1.0], "count": 2, "seed": 3}
    batches = evaluation.task_batches(
      tasks, tokens, lengths=[160, 200], **kwargs
    )
    alone = evaluation.task_batches(tasks[1:], tokens, lengths=[200], **kwargs)
    for batch, same in zip(
      batches["copying", 200], alone["copying", 200], strict=True
    ):
      np.testing.assert_array_equal(batch, same)
    config = toy.config(vocab_size=256)
    found = evaluation.task_accuracies(
      config,
      checkpoints_toy.random_params(config),
      batches,
      schedule=ic.ReuseSchedule("FSSF"),
      batch_size=2,
    )
    self.assertEqual(
      [(entry.task, entry.length, entry.count) for entry in found],
      [
        (task, length, 2)
        for task in ("needle", "copying")
        for length in (160, 200)
      ],
    )
    for entry in found:
      self.assertEqual(entry.accuracy.exact, 0.0)
    for (_, length), batch in batches.items():
      self.assertEqual(batch.prompts.shape[1] + batch.answers.shape[1], length)

  def test_too_short(self):
    with self.assertRaisesRegex(
      ValueError, "'multi_key' must hold its 16 facts.*471 tokens.*got 96"
    ):
      evaluation.task_batches(
        long_context_tasks.parse_tasks(["multi_key"]),
        np.zeros(500, np.int32),
        lengths=[100],
        depths=[0.5],
        count=1,
        seed=0,
      )


if __name__ == "__main__":
  absltest.main()
