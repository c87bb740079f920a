# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`selected_indexer_scores` and its gradients on the GPU."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from tests.gpu import device
from tests.kernels import selected_scores_mosaic_gpu_test as shared

_REPEATS = 20


def setUpModule():
  device.require_hopper()


class SelectedScoresDeviceTest(shared.SelectedScoresTest):
  def patches(self):
    return ()

  @parameterized.parameters(
    # More queries than pairs of warpgroups, and two chunks.
    (1, 700, 32, 128, 3000, 512),
    (3, 150, 8, 64, 500, 130),
    # More keys than selected, the whole cache, one query.
    (1, 1, 64, 128, 9000, 2048),
    (2, 40, 20, 128, 64, 64),
  )
  def test_drawn_cases_are_right_and_bit_equal(self, *shape):
    args = shared.inputs(*shape, seed=sum(shape))
    actual = shared.scores_and_gradients(*args)
    self.assert_right(args, actual)
    for _ in range(_REPEATS):
      again = shared.scores_and_gradients(*args)
      equal = jax.tree.map(jnp.array_equal, again, actual)
      self.assertTrue(all(jax.tree.leaves(equal)), equal)


if __name__ == "__main__":
  absltest.main()
