# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`top_k` on the GPU: the op's contract, garbage, and repetition."""

import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from tests.gpu import device, generated
from tests.kernels import topk_rows, topk_test

_REPEATS = 20


def setUpModule():
  device.require_hopper()


class TopKDeviceTest(topk_test.TopKTest):
  IMPLEMENTATION = "mosaic_gpu"
  REPEATS = _REPEATS


class TopKRowsDeviceTest(parameterized.TestCase):
  def test_garbage_behind_the_lengths(self):
    lengths = generated.lengths(np.random.default_rng(0), 64, 50001, 2048)
    scores = topk_rows.draw("normal", (64, 50001), seed=0)
    is_behind = np.arange(50001) >= lengths[:, None]
    run = generated.jitted("top_k", "mosaic_gpu", k=2048)
    expected = np.asarray(run(scores, lengths=lengths))
    for garbage in (np.nan, np.inf, 1e9, -np.inf):
      other = np.where(is_behind, np.float32(garbage), scores)
      np.testing.assert_array_equal(run(other, lengths=lengths), expected)

  @parameterized.parameters((512, 40001), (4, 131072), (1, 1048576))
  def test_twenty_runs_are_bit_equal(self, num_rows, num_keys):
    scores = jnp.asarray(
      topk_rows.draw("few_values", (num_rows, num_keys), seed=1)
    )
    run = generated.jitted("top_k", "mosaic_gpu", k=2048)
    first = np.asarray(run(scores))
    for _ in range(_REPEATS):
      np.testing.assert_array_equal(run(scores), first)


if __name__ == "__main__":
  device.main()
