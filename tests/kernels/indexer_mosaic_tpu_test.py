# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import tpu
from pallas_kernels.indexer import mosaic_tpu, shapes
from tests import tolerances
from tests.kernels import indexer_test, interpreters, loops


class MosaicTpuIndexerTest(indexer_test.IndexerTest):
  IMPLEMENTATION = "mosaic_tpu"
  COMPILER_OPTIONS = interpreters.COMPILER_OPTIONS

  def setUp(self):
    super().setUp()
    self.enter_context(interpreters.numbers())


def scores(args, tiles=None):
  call = jax.jit(
    lambda *args: mosaic_tpu.indexer_scores(*args, tiles=tiles),
    compiler_options=interpreters.COMPILER_OPTIONS,
  )
  return np.asarray(call(*args))


class MosaicTpuBlocksTest(parameterized.TestCase):
  """Blocks, skipped and cut, in the interpreters that keep time."""

  TILES = mosaic_tpu.Tiles(8, 128, 128)

  def inputs(self):
    # Blocks of 8 queries x 128 keys: some unseen, some cut at either end.
    q, k, w, start, end = indexer_test.inputs(
      shapes.Shape(2, 21, 300, 8, 16, 0), offset=100
    )
    return q, k, w, start.at[:, 12:].set(110), end.at[1, :8].set(0)

  @parameterized.parameters(*interpreters.MODES)
  def test_equals_a_float64_loop(self, mode):
    args = self.inputs()
    with interpreters.mode(mode):
      actual = scores(args, self.TILES)
    np.testing.assert_allclose(
      actual,
      loops.indexer_scores(*args),
      **tolerances.tolerance("float32", 16 * 8),
    )

  def test_a_block_too_many_skipped_is_caught(self):
    visible_blocks = mosaic_tpu._visible_blocks

    def one_off(*args):
      first, last = visible_blocks(*args)
      return first, last - 1

    args = self.inputs()
    with (
      mock.patch.object(mosaic_tpu, "_visible_blocks", one_off),
      interpreters.numbers(),
    ):
      actual = scores(args, self.TILES)
    self.assertTrue(
      np.any(np.isinf(actual) & (loops.indexer_scores(*args) > 0))
    )

  def test_one_query_folds_its_heads(self):
    args = indexer_test.inputs(shapes.Shape(3, 1, 300, 32, 16, 0), offset=250)
    with interpreters.numbers():
      actual = scores(args)
    np.testing.assert_allclose(
      actual,
      loops.indexer_scores(*args),
      **tolerances.tolerance("float32", 16 * 32),
    )


class MosaicTpuUnfitTest(absltest.TestCase):
  def check(self, q, k, message):
    weights = jnp.zeros((1, 4, 16))
    bounds = jnp.zeros((1, 4), jnp.int32)
    with self.assertRaisesRegex(NotImplementedError, message):
      pallas_kernels.indexer_topk(
        q, k, weights, bounds, bounds, k=2, implementation="mosaic_tpu"
      )

  def test_says_what_it_needs(self):
    q, k = jnp.zeros((1, 4, 16, 8)), jnp.zeros((1, 9, 8))
    with interpreters.chip():
      self.check(q.astype(jnp.bfloat16), k, "one dtype: got bfloat16")
      self.check(q.astype(jnp.float16), k.astype(jnp.float16), "got float16")
    chip = tpu.Chip("v5e", 128 << 20, 1, False)
    float8 = [x.astype(jnp.float8_e4m3fn) for x in (q, k)]
    with mock.patch.object(tpu, "chip", return_value=chip):
      self.check(*float8, "of v5e take bfloat16, float32: got float8")


if __name__ == "__main__":
  absltest.main()
