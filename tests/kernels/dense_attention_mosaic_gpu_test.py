# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from pallas_kernels.dense_attention import mosaic_gpu, shapes
from pallas_kernels.hopper import chip
from pallas_kernels.indexer import mosaic_gpu_schedule
from tests import tolerances
from tests.kernels import dense_attention_test

# Blocks that run in turn, as few as show that they share the work.
_CHIP = chip.Chip("H200", 3)
_TILES = mosaic_gpu.TILES._replace(members=1)
_SHORT = _TILES._replace(segment=2)


class _Interpreted:
  """Runs the kernels on the CPU; a copy to several blocks can't be."""

  def setUp(self):
    super().setUp()
    for context in (
      mock.patch.object(chip, "chip", return_value=_CHIP),
      mock.patch.object(mosaic_gpu, "TILES", _TILES),
      plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
    ):
      self.enter_context(context)


class MosaicGpuDenseAttentionTest(
  _Interpreted, dense_attention_test.DenseAttentionTest
):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = jnp.bfloat16

  def test_run_to_run_bit_equal(self):
    self.skipTest("the interpreter has one order: tests/gpu runs it on a GPU")


class MosaicGpuBlocksTest(_Interpreted, parameterized.TestCase):
  """Blocks and segments, unseen, filled and cut."""

  def inputs(self, queries, keys, heads):
    query, latent, start, end = dense_attention_test.inputs(
      shapes.Shape(2, queries, keys, heads, 128), jnp.bfloat16
    )
    # One sequence sees a run in the middle, the other almost nothing.
    start = start.at[0].set(170)
    end = end.at[0].set(jnp.minimum(end[0], 333)).at[1].set(3)
    return query, latent, start, end

  def check(self, args):
    actual = mosaic_gpu.dense_mla_residuals(*args, scale=0.1)
    expected = dense_attention_test.loop(*args, 0.1)
    for a, b in zip(actual, expected, strict=True):
      np.testing.assert_allclose(a, b, **tolerances.tolerance("float32", 128))

  @parameterized.parameters((128, 512, 2), (150, 500, 3))
  def test_equals_a_float64_loop(self, queries, keys, heads):
    with mock.patch.object(mosaic_gpu, "TILES", _SHORT):
      self.check(self.inputs(queries, keys, heads))

  def test_finds_no_race(self):
    # Whole blocks: cut ones overlap, and write the same numbers twice.
    params = plgpu.InterpretGPUParams(detect_races=True)
    with (
      plgpu.force_gpu_interpret_mode(params),
      mock.patch.object(mosaic_gpu, "TILES", _SHORT),
    ):
      self.check(self.inputs(128, 512, 2))

  def test_a_block_too_many_skipped_is_caught(self):
    schedule = mosaic_gpu_schedule.schedule

    def one_off(start, end, **kwargs):
      return schedule(start, end - 128, **kwargs)

    args = self.inputs(128, 512, 2)
    with (
      mock.patch.object(mosaic_gpu_schedule, "schedule", one_off),
      self.assertRaises(AssertionError),
    ):
      self.check(args)


class MosaicGpuUnfitTest(absltest.TestCase):
  def check(self, query, latent, message):
    bounds = jnp.zeros(query.shape[:2], jnp.int32)
    with self.assertRaisesRegex(NotImplementedError, message):
      pallas_kernels.dense_mla_residuals(
        query, latent, bounds, bounds, scale=1.0, implementation="mosaic_gpu"
      )

  def test_says_what_it_needs(self):
    query, latent = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 9, 8))
    self.check(query, latent, f"got {jax.devices()[0].device_kind}")
    with mock.patch.object(chip, "chip", return_value=_CHIP):
      self.check(query.astype(jnp.bfloat16), latent, "bfloat16: got float32")
      query, latent = (
        jnp.zeros((*x.shape[:-1], 640), jnp.bfloat16) for x in (query, latent)
      )
      self.check(query, latent, "up to 576 columns: got 640")


if __name__ == "__main__":
  absltest.main()
