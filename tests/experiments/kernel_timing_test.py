# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How times are summed up, with a clock of the test's own."""

import time
from unittest import mock

import jax
from absl.testing import absltest
from jax.experimental.mosaic.gpu import profiler

from experiments import kernel_timing


class KernelTimingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.call = mock.Mock(side_effect=lambda x: x + 1)

  def sustained(self, seconds, launches):
    """Sustained time of a call where the clock shows these, batch by batch."""
    with mock.patch.object(time, "perf_counter", side_effect=seconds):
      return kernel_timing.sustained_ms(
        self.call, jax.numpy.ones(1), launches=launches
      )

  def test_the_median_of_batches_without_the_first(self):
    # Two calls a batch, and a warm-up that took 90 seconds.
    found = self.sustained([90, 92, 96, 102, 104, 114], launches=12)
    self.assertEqual(found, (2000, 1000, 5000))
    self.assertEqual(self.call.call_count, 6 * 2 + 2)

  def test_launches_fill_whole_batches(self):
    found = self.sustained([0, 1, 2, 3, 4, 5], launches=7)
    self.assertEqual(found, (500, 500, 500))
    self.assertEqual(self.call.call_count, 6 * 2 + 2)

  def test_short_kernels_by_the_driver(self):
    times = [90.0, 90.0, 1.0, 3.0, 1.0, 1.0, 4.0, 4.0, 3.0, 3.0, 8.0, 8.0]
    with mock.patch.object(profiler, "Cupti") as cupti:
      cupti().measure.return_value = lambda x: (x, times)
      found = self.sustained([0, 0, 0, 0, 0, 0], launches=12)
    self.assertEqual(found, (3, 1, 8))
    cupti().measure.assert_called_once_with(self.call, iterations=12)

  def test_ceilings_of_both_modes(self):
    with (
      mock.patch.object(kernel_timing, "isolated_ms", return_value=2.0),
      mock.patch.object(
        kernel_timing,
        "sustained_ms",
        return_value=kernel_timing.Sustained(4.0, 3.0, 5.0),
      ),
    ):
      copy = kernel_timing.copy_ceiling(num_bytes=int(4e6))
      product = kernel_timing.matmul_ceiling("bfloat16", size=100)
    self.assertEqual(copy, {"isolated": 4e-3, "sustained": 2e-3})
    self.assertEqual(product, {"isolated": 1e-3, "sustained": 5e-4})


if __name__ == "__main__":
  absltest.main()
