# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`top_k` on the GPU: rows of every kind and length, against its definition.

The definition compares float32 values, which is exact.
"""

import numpy as np
from absl.testing import parameterized

from tests.gpu import device, generated

# Rows, scores, k, calls: few rows and many, around every size that the kernel
# has, aligned and not. Calls with lengths; one without.
_CALLS = (
  (3, 9, 4, 20),
  (7, 40, 8, 20),
  (5, 1000, 1, 12),
  (2, 2047, 2048, 10),
  (3, 5000, 4096, 10),
  (9, 32768, 2048, 4),
  (3, 16385, 2048, 8),
  (140, 4097, 100, 3),
  (140, 20000, 512, 2),
  (134, 32768, 2048, 2),
  (512, 32768, 2048, 1),
  (133, 65543, 2048, 1),
  (2, 131072, 2048, 10),
  (3, 131074, 2048, 7),
  (4, 131073, 4096, 5),
  (2, 140001, 8192, 10),
  (3, 262147, 7, 4),
  (1, 1048576, 2048, 10),
  (1, 1048573, 2048, 10),
  (1 << 20, 16, 8, 1),
)
# Rows of a call that are compared.
_MOST_ROWS = 1024


def setUpModule():
  device.require_hopper()


class TopKGeneratedTest(parameterized.TestCase):
  IMPLEMENTATION = "mosaic_gpu"

  @parameterized.parameters(*_CALLS)
  def test_rows(self, num_rows, num_keys, k, calls):
    rng = np.random.default_rng(num_keys + k)
    run = generated.jitted("top_k", self.IMPLEMENTATION, k=k)
    for call in range(calls):
      scores = generated.rows(rng, num_rows, num_keys, call * num_rows)
      lengths = generated.lengths(rng, num_rows, num_keys, k)
      self.check(run(scores, lengths=lengths), scores, lengths, k)
    self.check(run(scores), scores, None, k)

  def check(self, actual, scores, lengths, k):
    rows = slice(None)
    if len(scores) > _MOST_ROWS:
      rows = np.random.default_rng(k).permutation(len(scores))[:_MOST_ROWS]
      lengths = None if lengths is None else lengths[rows]
    scores, actual = scores[rows], np.asarray(actual)[rows]
    wrong = generated.wrong_selections(scores, lengths, k, actual)
    self.assertEmpty(wrong, f"rows, with lengths: {lengths is not None}")
    device.count_cases(len(scores))


if __name__ == "__main__":
  device.main()
