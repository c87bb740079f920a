# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The Mosaic GPU kernel's text, run by the emulator on a CPU."""

import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.hopper import chip
from pallas_kernels.topk import mosaic_gpu
from tests.kernels import loops, simt_emulator, topk_rows, topk_test


def emulate(seed):
  """What stands in for `mosaic_gpu._launch`: the same text, in NumPy."""

  def launch(plan, num_places, out):
    body = functools.partial(mosaic_gpu._select, plan, len(out))

    def run(*inputs):
      results = [np.full(x.shape, -7, x.dtype) for x in out]
      arrays = [simt_emulator.Array(np.array(x)) for x in (*inputs, *results)]
      for place in range(num_places):
        simt_emulator.run_block(
          body,
          [*arrays, simt_emulator.Array.shared(plan.shared_words)],
          [place],
          num_threads=plan.num_threads,
          seed=seed + place,
        )
      return [
        array.words.view(x.dtype).reshape(x.shape)
        for array, x in zip(arrays[len(inputs) :], out, strict=True)
      ]

    return lambda *inputs: jax.pure_callback(run, out, *inputs)

  return launch


# Of `topk_rows.KINDS`, for tests that take longer.
_SOME_KINDS = (
  "relu",
  "ties",
  "rising",
  "mostly_masked",
  "nan",
  "sampled_high_8",
  "sampled_low_8",
)


class EmulatedTest(parameterized.TestCase):
  """Small blocks, so that short rows take many tiles."""

  MIN_SEGMENT = 1 << 30

  def setUp(self):
    super().setUp()
    self.patch(mosaic_gpu, "_launch", emulate(seed=0))
    self.patch_tiles(
      num_threads=64,
      chunks=1,
      drained_chunks=1,
      min_segment=self.MIN_SEGMENT,
    )
    self.patch(mosaic_gpu, "_MORE_THAN_K", (16, 128))
    self.patch(chip, "chip", lambda: chip.Chip("NVIDIA H200", 132))

  def patch_tiles(self, **sizes):
    self.patch(mosaic_gpu, "FEW_ROWS", mosaic_gpu.FEW_ROWS._replace(**sizes))

  def patch(self, target, name, value):
    self.enter_context(mock.patch.object(target, name, value))

  def check(self, scores, k, lengths=None):
    actual = mosaic_gpu.top_k(
      jnp.asarray(scores), k, None if lengths is None else jnp.array(lengths)
    )
    for row, row_scores in enumerate(scores):
      length = None if lengths is None else lengths[row]
      np.testing.assert_array_equal(
        actual[row], topk_rows.select(row_scores[:length], k), err_msg=str(row)
      )
    return np.asarray(actual)


class MosaicGpuTopKTest(EmulatedTest, topk_test.TopKTest):
  IMPLEMENTATION = "mosaic_gpu"
  REPEATS = 1
  KEYS_AND_K = tuple(itertools.product((9, 129, 1000), (1, 33)))

  def check(self, scores, k, lengths=None):
    topk_test.TopKTest.check(self, scores, k, lengths)


class MosaicGpuRowsTest(EmulatedTest):
  @parameterized.parameters(*topk_rows.KINDS)
  def test_one_block_a_row(self, kind):
    scores = topk_rows.draw(kind, (2, 3001), seed=0)
    self.check(scores, 33)
    self.check(scores, 150, [2999, 1502])

  @parameterized.parameters(*_SOME_KINDS)
  def test_more_chunks_a_tile(self, kind):
    self.patch_tiles(num_threads=128, chunks=4, drained_chunks=2)
    self.check(topk_rows.draw(kind, (1, 9003), seed=1), 300, [9001])

  @parameterized.parameters(1, 2, 3)
  def test_results_do_not_depend_on_the_order_of_warps(self, seed):
    scores = topk_rows.draw("few_values", (2, 2003), seed=2)
    first = self.check(scores, 70)
    self.patch(mosaic_gpu, "_launch", emulate(seed=100 * seed))
    np.testing.assert_array_equal(self.check(scores, 70), first)

  def test_every_k_around_the_number_of_candidates(self):
    scores = topk_rows.draw("mostly_masked", (1, 700), seed=3)
    count = int(np.sum(scores > -np.inf))
    for k in range(max(1, count - 2), count + 3):
      self.check(scores, k)


class MosaicGpuSegmentsTest(EmulatedTest):
  MIN_SEGMENT = 256

  @parameterized.parameters(*_SOME_KINDS)
  def test_few_rows(self, kind):
    scores = topk_rows.draw(kind, (3, 2501), seed=4)
    plan = mosaic_gpu.plan_of(3, 2501, 40, 132)
    self.assertGreater(plan.num_segments, 4)
    self.check(scores, 40, [2501, 1301, 3])


class MosaicGpuBarriersTest(EmulatedTest):
  def rows(self):
    yield topk_rows.draw("rising", (1, 3001), seed=5), 70
    # Too few pass the sample's floor, enough to fill the queue; none of them
    # in the last tile.
    misled = topk_rows.draw("sampled_high_2", (1, 700), seed=5)
    misled[:, 4:164:8] = 50
    misled[:, 512:] = -50
    yield misled, 150

  def check_rows(self):
    for scores, k in self.rows():
      self.check(scores, k)

  def test_each_barrier_is_needed(self):
    """Leaves out one barrier at a time, by its place in the text."""
    places = set()
    barrier = simt_emulator.Machine.barrier

    def record(machine):
      places.add(simt_emulator.caller())
      barrier(machine)

    with mock.patch.object(simt_emulator.Machine, "barrier", record):
      self.check_rows()
    self.assertGreater(len(places), 4)
    for left_out in places:

      def some(machine, left_out=left_out):
        if simt_emulator.caller() != left_out:
          barrier(machine)

      with (
        self.subTest(left_out),
        mock.patch.object(simt_emulator.Machine, "barrier", some),
        self.assertRaisesRegex(Exception, "race"),
      ):
        self.check_rows()


class MosaicGpuUnfitTest(absltest.TestCase):
  def test_another_chip(self):
    with self.assertRaisesRegex(NotImplementedError, "Hopper"):
      mosaic_gpu.top_k(jnp.zeros((1, 8)), 2)

  def test_too_large_a_k(self):
    found = chip.Chip("NVIDIA H200", 132)
    with (
      mock.patch.object(chip, "chip", lambda: found),
      self.assertRaisesRegex(NotImplementedError, "got k=8193"),
    ):
      mosaic_gpu.top_k(jnp.zeros((1, 8)), 8193)


class RowsTest(parameterized.TestCase):
  @parameterized.parameters(*topk_rows.KINDS)
  def test_select_is_that_of_the_loop(self, kind):
    scores = topk_rows.draw(kind, (300,), seed=6)
    for k in (1, 40, 300, 310):
      np.testing.assert_array_equal(
        topk_rows.select(scores, k), loops.select(scores, k)
      )


if __name__ == "__main__":
  absltest.main()
