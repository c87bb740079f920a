# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from pallas_kernels.hopper import chip
from pallas_kernels.indexer import (
  mosaic_gpu,
  mosaic_gpu_decode_kernel,
  mosaic_gpu_kernel,
  mosaic_gpu_schedule,
  shapes,
)
from pallas_kernels.topk import reference as topk_reference
from tests import tolerances
from tests.kernels import indexer_test, loops

# Blocks that run in turn, as few as show that they share the work.
_CHIP = chip.Chip("H200", 3)


def _greedy_top_k(scores, k, lengths):
  """The reference, but for NaN, which it takes first.

  The interpreter's fresh memory is NaN: a score that was never written is
  selected, as on the GPU it might be.
  """
  scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
  return topk_reference.top_k(scores, k, lengths)


class _Interpreted:
  """Runs the kernels on the CPU.

  Neither `top_k` nor a copy to several blocks can be interpreted.
  """

  def setUp(self):
    super().setUp()
    for context in (
      mock.patch.object(chip, "chip", return_value=_CHIP),
      mock.patch.object(
        mosaic_gpu, "MANY_QUERIES", mosaic_gpu.MANY_QUERIES._replace(members=1)
      ),
      mock.patch.object(mosaic_gpu.topk_gpu, "top_k", _greedy_top_k),
      plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
    ):
      self.enter_context(context)


class MosaicGpuIndexerTest(_Interpreted, indexer_test.IndexerTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = jnp.bfloat16

  def test_holds_no_array_of_queries_by_keys(self):
    self.skipTest("the interpreter holds what it likes: tests/gpu compiles it")

  def test_holds_no_scores_of_all_sequences(self):
    self.skipTest("the interpreter holds what it likes: tests/gpu compiles it")

  def test_run_to_run_bit_equal(self):
    self.skipTest("the interpreter has one order: tests/gpu runs it on a GPU")


class MosaicGpuTransformedTest(_Interpreted, indexer_test.TransformedTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = jnp.bfloat16


class MosaicGpuKeyScaleTest(_Interpreted, indexer_test.KeyScaleTest):
  IMPLEMENTATION = "mosaic_gpu"


class MosaicGpuTilesTest(_Interpreted, parameterized.TestCase):
  """Tiles, skipped, filled and cut."""

  MANY = mosaic_gpu_kernel.Tiles(warpgroups=2, keys=64, stages=2, members=1)
  FEW = mosaic_gpu_decode_kernel.Tiles(warpgroups=2, stages=2)

  def scores(self, args, tiles, **kwargs):
    scores = mosaic_gpu._scores(*args, chip=_CHIP, tiles=tiles, **kwargs)
    return np.asarray(scores)[:, : args[0].shape[1], : args[1].shape[1]]

  def inputs(self, queries, heads, keys=500):
    q, k, w, start, end = indexer_test.inputs(
      (2, queries, keys, heads, 64), jnp.bfloat16
    )
    # One sequence sees a run in the middle, the other almost nothing.
    start = start.at[0].set(170)
    end = end.at[0].set(jnp.minimum(end[0], 333)).at[1].set(3)
    return q, k, w, start, end

  def check(self, args, actual):
    expected = loops.indexer_scores(*args)
    np.testing.assert_allclose(
      actual, expected, **tolerances.tolerance("float32", 64 * 4)
    )

  @parameterized.parameters(64, 128, 150)
  def test_many_queries(self, queries):
    args = self.inputs(queries, 3)
    self.check(args, self.scores(args, self.MANY))

  @parameterized.parameters(1, 3)
  def test_few_queries(self, queries):
    args = self.inputs(queries, 8)
    self.check(args, self.scores(args, self.FEW))

  @parameterized.parameters((64, 3, "MANY"), (2, 8, "FEW"))
  def test_finds_no_race(self, queries, heads, tiles):
    # Whole tiles: cut ones overlap, and write the same numbers twice.
    args = self.inputs(queries, heads, keys=512)
    params = plgpu.InterpretGPUParams(detect_races=True)
    with plgpu.force_gpu_interpret_mode(params):
      self.check(args, self.scores(args, getattr(self, tiles)))

  @parameterized.parameters((70, 3, "MANY"), (2, 8, "FEW"))
  def test_what_top_k_does_not_read_is_not_filled(self, queries, heads, tiles):
    args = self.inputs(queries, heads)
    end = np.asarray(args[-1])
    actual = self.scores(args, getattr(self, tiles), fills_behind=False)
    is_read = np.arange(500) < end[..., None]
    expected = loops.indexer_scores(*args)
    self.check(args, np.where(is_read, actual, expected))

  def test_a_tile_too_many_skipped_is_caught(self):
    schedule = mosaic_gpu_schedule.schedule

    def one_off(start, end, **kwargs):
      return schedule(start, end - 128, **kwargs)

    args = self.inputs(64, 3)
    with mock.patch.object(mosaic_gpu_schedule, "schedule", one_off):
      actual = self.scores(args, self.MANY)
    self.assertTrue(
      np.any(np.isinf(actual) & (loops.indexer_scores(*args) > -np.inf))
    )


class MosaicGpuShapesTest(parameterized.TestCase):
  @parameterized.parameters(*shapes.SHAPES.items())
  def test_tiles_fit_the_shared_memory(self, _, shape):
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
      row_bytes = 128 * jnp.dtype(dtype).itemsize
      tiles = mosaic_gpu._tiles(shape.num_queries, shape.heads, row_bytes)
      is_decode = isinstance(tiles, mosaic_gpu_decode_kernel.Tiles)
      self.assertEqual(is_decode, shape.num_queries * shape.heads <= 256)
      self.assertGreaterEqual(tiles.stages, 2)


class MosaicGpuUnfitTest(absltest.TestCase):
  def check(self, q, k, message):
    weights = jnp.zeros(q.shape[:3])
    bounds = jnp.zeros(q.shape[:2], jnp.int32)
    for op, kwargs in (
      (pallas_kernels.indexer_scores, {}),
      (pallas_kernels.indexer_topk, {"k": 2}),
    ):
      with self.assertRaisesRegex(NotImplementedError, message):
        op(
          q, k, weights, bounds, bounds, implementation="mosaic_gpu", **kwargs
        )  # fmt: skip

  def test_says_what_it_needs(self):
    q, k = jnp.zeros((1, 4, 16, 8)), jnp.zeros((1, 9, 8))
    self.check(q, k, f"Hopper.*: got {jax.devices()[0].device_kind}")
    with mock.patch.object(chip, "chip", return_value=_CHIP):
      self.check(q.astype(jnp.bfloat16), k, "one dtype: got bfloat16")
      self.check(q, k, "bfloat16, float8_e4m3fn: got float32")
      q, k = jnp.zeros((1, 4, 16, 192)), jnp.zeros((1, 9, 192))
      self.check(
        q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), "at most 128: got 192"
      )


if __name__ == "__main__":
  absltest.main()
