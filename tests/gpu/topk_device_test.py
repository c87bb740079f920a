# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`top_k` on the GPU."""

from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from tests.gpu import device
from tests.kernels import topk_rows, topk_test

# Rows, scores, k: few rows and many, around every size that the kernel has,
# aligned and not.
_SHAPES = (
  (3, 9, 4),
  (7, 40, 8),
  (5, 1000, 1),
  (2, 2047, 2048),
  (3, 5000, 4096),
  (9, 32768, 2048),
  (3, 16385, 2048),
  (2, 131072, 2048),
  (3, 131074, 2048),
  (4, 131073, 4096),
  (2, 140001, 8192),
  (3, 262147, 7),
  (1, 1048576, 2048),
  (1, 1048573, 2048),
  (140, 4097, 100),
  (140, 20000, 512),
  (134, 32768, 2048),
  (133, 65543, 2048),
)
# Scores beyond which not every kind is drawn.
_LARGE = 1 << 19
_CHECKED_ROWS = 16


def setUpModule():
  device.require_hopper()


class TopKDeviceTest(topk_test.TopKTest):
  IMPLEMENTATION = "mosaic_gpu"
  REPEATS = 20


class TopKRowsDeviceTest(parameterized.TestCase):
  @parameterized.parameters(*_SHAPES)
  def test_hostile_rows(self, num_rows, num_keys, k):
    @jax.jit
    def run(scores, lengths):
      return pallas_kernels.top_k(
        scores, k, lengths, implementation="mosaic_gpu"
      )

    own_lengths = self.lengths(num_rows, num_keys, k)
    is_large = num_rows * num_keys > _LARGE
    for kind in topk_rows.KINDS[:: 3 if is_large else 1]:
      scores = topk_rows.draw(kind, (num_rows, num_keys), seed=k)
      for lengths in (None, own_lengths):
        with self.subTest(kind=kind, has_lengths=lengths is not None):
          self.check(run(scores, lengths), scores, k, lengths)

  def lengths(self, num_rows, num_keys, k):
    """Any, and every third next to k or the ends."""
    rng = np.random.default_rng(num_keys)
    ends = np.clip([0, 1, k - 1, k, k + 1, num_keys - 1], 0, num_keys)
    lengths = rng.integers(0, num_keys + 1, num_rows)
    chosen = rng.choice(ends, num_rows)
    return np.where(rng.random(num_rows) < 1 / 3, chosen, lengths).astype(
      np.int32
    )

  def check(self, actual, scores, k, lengths):
    rows = np.random.default_rng(k).permutation(len(scores))[:_CHECKED_ROWS]
    ends = [None if lengths is None else lengths[row] for row in rows]
    with futures.ThreadPoolExecutor() as pool:
      expected = pool.map(
        lambda row, end: topk_rows.select(scores[row, :end], k), rows, ends
      )
    actual = np.asarray(actual)[rows]
    np.testing.assert_array_equal(actual, np.stack(list(expected)))

  def test_garbage_behind_the_lengths(self):
    lengths = self.lengths(64, 50001, 2048)
    scores = topk_rows.draw("normal", (64, 50001), seed=0)
    is_behind = np.arange(50001) >= lengths[:, None]
    run = jax.jit(
      lambda scores, lengths: pallas_kernels.top_k(
        scores, 2048, lengths, implementation="mosaic_gpu"
      )
    )
    expected = np.asarray(run(scores, lengths))
    for garbage in (np.nan, np.inf, 1e9, -np.inf):
      other = np.where(is_behind, np.float32(garbage), scores)
      np.testing.assert_array_equal(run(other, lengths), expected)

  @parameterized.parameters((512, 40001), (4, 131072), (1, 1048576))
  def test_twenty_runs_are_bit_equal(self, num_rows, num_keys):
    scores = jnp.asarray(
      topk_rows.draw("few_values", (num_rows, num_keys), seed=1)
    )
    run = jax.jit(
      lambda scores: pallas_kernels.top_k(
        scores, 2048, implementation="mosaic_gpu"
      )
    )
    first = np.asarray(run(scores))
    for _ in range(20):
      np.testing.assert_array_equal(run(scores), first)


if __name__ == "__main__":
  absltest.main()
