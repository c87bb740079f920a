# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernel that merges selections, its text run by the emulator."""

import functools

import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.sparse_attention import mosaic_gpu_shared_rows as shared
from tests.kernels import simt_emulator


def emulate(indices, share, seed=0):
  """What `mosaic_gpu_shared_rows.call` returns."""
  plan = shared.Plan(share, indices.shape[1])
  groups = len(indices) // share
  inputs = simt_emulator.Array(np.array(indices, np.int32))
  entries = np.full((groups, plan.size), -7, np.int32)
  outputs = [
    simt_emulator.Array(x) for x in (entries, np.full(groups, -7, np.int32))
  ]
  for group in range(groups):
    simt_emulator.run_block(
      functools.partial(shared.merge, plan),
      [inputs, *outputs, simt_emulator.Array.shared(plan.shared_words)],
      [group],
      num_threads=shared._THREADS,
      seed=seed + group,
    )
  found, counts = (x.words.view(np.int32) for x in outputs)
  return found.reshape(entries.shape), counts


def draw(rng, groups, share, count, num_keys, lengths):
  """Ascending rows of each query, -1 behind."""
  rows = np.full((groups * share, count), -1, np.int32)
  for query, row in enumerate(rows):
    length = min(lengths[query % len(lengths)], num_keys, count)
    row[:length] = np.sort(rng.permutation(num_keys)[:length])
  return rows


def looped(indices, share):
  """Entries and counts of each group, by sets."""
  entries = np.full((len(indices) // share, indices[0].size * share), -1)
  counts = np.zeros(len(entries), np.int32)
  for group, queries in enumerate(indices.reshape(len(entries), share, -1)):
    rows = sorted({int(row) for row in queries.ravel() if row >= 0})
    counts[group] = len(rows)
    for place, row in enumerate(rows):
      bits = sum((row in queries[q]) << (31 - share + q) for q in range(share))
      entries[group, place] = row + bits
  return entries.astype(np.int32), counts


class SharedRowsTest(parameterized.TestCase):
  @parameterized.parameters(
    # Queries of a group, rows of a query, keys.
    (2, 8, 12),
    (3, 128, 400),
    (3, 100, 101),
    (4, 33, 1 << 20),
    (8, 5, 9),
    (2, 1, 3),
  )
  def test_equals_sets(self, share, count, num_keys):
    rng = np.random.default_rng(0)
    lengths = (count, count, count // 2, 0, 1)
    indices = draw(rng, 5, share, count, num_keys, lengths)
    # One group selects the same, one nothing.
    indices[share : 2 * share] = indices[0]
    indices[2 * share : 3 * share] = -1
    expected = looped(indices, share)
    for actual, want in zip(emulate(indices, share), expected, strict=True):
      np.testing.assert_array_equal(actual, want)

  def test_the_last_row_that_fits(self):
    last = shared.most_rows(3) - 1
    indices = np.array([[0, last], [last, -1], [5, last]], np.int32)
    for actual, want in zip(
      emulate(indices, 3), looped(indices, 3), strict=True
    ):
      np.testing.assert_array_equal(actual, want)


if __name__ == "__main__":
  absltest.main()
