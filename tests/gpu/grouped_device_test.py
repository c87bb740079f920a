# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`grouped_matmul` on the GPU."""

from absl.testing import absltest

from tests.gpu import device
from tests.kernels import grouped_test


def setUpModule():
  device.require_hopper()


class GroupedMatmulDeviceTest(grouped_test.GroupedMatmulTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = "bfloat16"
  WIDTHS = (128, 256)


if __name__ == "__main__":
  absltest.main()
