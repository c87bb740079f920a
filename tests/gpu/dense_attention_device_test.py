# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense attention's statistics on the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.dense_attention import shapes
from tests import tolerances
from tests.gpu import device
from tests.kernels import dense_attention_test


def setUpModule():
  device.require_hopper()


class DenseAttentionDeviceTest(dense_attention_test.DenseAttentionTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = jnp.bfloat16


@functools.partial(jax.jit, static_argnames=("implementation",))
def residuals(args, implementation="mosaic_gpu"):
  return pallas_kernels.dense_mla_residuals(
    *args, scale=0.06, implementation=implementation
  )


def inputs(rng, shape, bounds):
  """Random arguments; bounds are "causal", "segments" or "random"."""
  query, latent, start, end = dense_attention_test.inputs(
    shape, jnp.bfloat16, seed=int(rng.integers(1 << 30))
  )
  if bounds == "segments":
    start = (end - 1).clip(0) // 300 * 300
  elif bounds == "random":
    start, end = (
      jnp.asarray(
        rng.integers(0, shape.num_keys + 1, size=end.shape), jnp.int32
      )
      for _ in range(2)
    )
  return query, latent, start, end


class GeneratedCasesTest(parameterized.TestCase):
  def check(self, args):
    widened = tuple(x.astype(jnp.float32) for x in args[:2]) + args[2:]
    expected = residuals(widened, "xla")
    for a, b in zip(residuals(args), expected, strict=True):
      np.testing.assert_allclose(a, b, **tolerances.tolerance("float32", 64))

  @parameterized.parameters(*range(6))
  def test_random_shapes(self, seed):
    rng = np.random.default_rng(seed)
    shape = shapes.Shape(
      int(rng.integers(1, 3)),
      int(rng.choice([1, 64, 128, 129, 300])),
      int(rng.choice([1, 100, 256, 777, 3000, 9001])),
      int(rng.choice([1, 2, 5, 20])),
      int(rng.choice([16, 64, 128, 576])),
    )
    self.check(inputs(rng, shape, ("causal", "segments", "random")[seed % 3]))

  @parameterized.parameters(20, 64, 128)
  def test_real_heads(self, heads):
    shape = shapes.Shape(1, 256, 16384, heads, 576)
    self.check(inputs(np.random.default_rng(0), shape, "causal"))

  def test_bit_equal_over_20_runs(self):
    shape = shapes.Shape(2, 200, 9001, 8, 576)
    args = inputs(np.random.default_rng(1), shape, "random")
    first = residuals(args)
    for _ in range(20):
      jax.tree.map(np.testing.assert_array_equal, first, residuals(args))


if __name__ == "__main__":
  absltest.main()
