# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from pallas_kernels.hopper import chip
from tests.kernels import expert_mlp_test


class MosaicGpuExpertMLPTest(expert_mlp_test.ExpertMLPTest):
  """The kernel for few rows, interpreted."""

  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = "bfloat16"
  WIDTHS = (384, 128)
  ROWS = (1, 13)

  def setUp(self):
    super().setUp()
    for context in (
      mock.patch.object(chip, "chip", return_value=chip.Chip("H200", 3)),
      plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
    ):
      self.enter_context(context)

  def test_nan_in_an_unused_expert_touches_nothing(self):
    rows, experts, weights, *matrices = self.inputs(3, choices=1)
    unused = next(g for g in range(6) if g not in np.asarray(experts))
    matrices = [x.at[unused].set(jnp.nan) for x in matrices]
    clean = [x.at[unused].set(0) for x in matrices]
    np.testing.assert_array_equal(
      self.run_op(rows, experts, weights, *matrices),
      self.run_op(rows, experts, weights, *clean),
    )

  def test_nan_in_the_shared_expert_reaches_every_row(self):
    *args, shared = self.inputs(3, num_shared=1)
    broken = shared._replace(down=shared.down.at[0].set(jnp.nan))
    self.assertTrue(np.isnan(self.run_op(*args, broken)).all())

  def test_gradients_are_those_of_a_loop(self):
    self.skipTest("they are the sorted form's: tests/gpu runs them on a GPU")


class UnfitTest(absltest.TestCase):
  def test_says_what_it_needs(self):
    for dtype, width, message in (
      ("float32", 128, "16-bit dtype.*got float32"),
      ("bfloat16", 96, "multiples of 128: got 96 x 128"),
    ):
      rows = jnp.zeros((8, width), dtype)
      gate = jnp.zeros((2, width, 128), dtype)
      with self.assertRaisesRegex(NotImplementedError, message):
        pallas_kernels.expert_mlp(
          rows,
          jnp.zeros((8, 1), jnp.int32),
          jnp.ones((8, 1)),
          gate,
          gate,
          gate.swapaxes(1, 2),
          implementation="mosaic_gpu",
        )


if __name__ == "__main__":
  absltest.main()
