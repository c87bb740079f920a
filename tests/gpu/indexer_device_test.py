# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The indexer on the GPU: the op's contract, and repetition."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from tests.gpu import device, generated
from tests.kernels import indexer_test

_REPEATS = 20


def setUpModule():
  device.require_hopper()


class IndexerDeviceTest(indexer_test.IndexerTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = jnp.bfloat16
  UNCOPIED_DIM = 64


class TransformedDeviceTest(indexer_test.TransformedTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = jnp.bfloat16


class KeyScaleDeviceTest(indexer_test.KeyScaleTest):
  IMPLEMENTATION = "mosaic_gpu"

  def tolerance(self):
    # The matrix units sum 8-bit products to some 14 bits.
    return {"atol": 3e-2, "rtol": 1e-3}


class RepetitionTest(parameterized.TestCase):
  @parameterized.product(
    dtype=(jnp.bfloat16, jnp.float8_e4m3fn),
    # Prefill and decoding.
    shape=((2, 200, 5001, 32, 128), (3, 1, 40000, 32, 128)),
  )
  def test_twenty_runs_are_bit_equal(self, dtype, shape):
    rng = np.random.default_rng(1)
    batch, queries, num_keys, heads, dim = shape
    args = (
      generated.normal(rng, batch, queries, heads, dim, dtype=dtype),
      generated.normal(rng, batch, num_keys, dim, dtype=dtype),
      generated.normal(rng, batch, queries, heads, dtype=jnp.float32),
      *generated.bounds(rng, batch, queries, num_keys),
    )
    run = [
      generated.jitted("indexer_scores", "mosaic_gpu"),
      generated.jitted("indexer_topk", "mosaic_gpu", k=512),
    ]
    first = [call(*args) for call in run]
    for _ in range(_REPEATS):
      again = [call(*args) for call in run]
      jax.tree.map(np.testing.assert_array_equal, first, again)


if __name__ == "__main__":
  device.main()
