# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense attention's statistics on the GPU: the op's contract."""

import jax.numpy as jnp

from tests.gpu import device
from tests.kernels import dense_attention_test


def setUpModule():
  device.require_hopper()


class DenseAttentionDeviceTest(dense_attention_test.DenseAttentionTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = jnp.bfloat16


if __name__ == "__main__":
  device.main()
