# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The indexer on the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.topk import reference as topk_reference
from tests import tolerances
from tests.gpu import device
from tests.kernels import indexer_test

_DTYPES = (jnp.bfloat16, jnp.float8_e4m3fn)
# Of a score, relative to its terms without their signs: the matrix units
# sum 8-bit products to some 14 bits.
_ROUNDING = {"bfloat16": 3e-7, "float8_e4m3fn": 3e-4}


def setUpModule():
  device.require_hopper()


class IndexerDeviceTest(indexer_test.IndexerTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = jnp.bfloat16


class TransformedDeviceTest(indexer_test.TransformedTest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPE = jnp.bfloat16


class KeyScaleDeviceTest(indexer_test.KeyScaleTest):
  IMPLEMENTATION = "mosaic_gpu"

  def tolerance(self):
    return {"atol": 3e-2, "rtol": 1e-3}


def inputs(rng, shape, dtype, bounds):
  """Random arguments and key scales.

  Args:
    rng: numpy's.
    shape: batch, queries, keys, heads, dim.
    dtype: of queries and keys.
    bounds: "causal", "segments" or "random".
  """
  batch, queries, keys, heads, dim = shape
  q = rng.standard_normal((batch, queries, heads, dim), np.float32)
  k = rng.standard_normal((batch, keys, dim), np.float32)
  w = rng.standard_normal((batch, queries, heads), np.float32)
  place = np.broadcast_to(
    np.clip(np.arange(queries) + 1 + keys - queries, 0, keys), (batch, queries)
  )
  start, end = np.zeros_like(place), place
  if bounds == "segments":
    start = (place - 1).clip(0) // 300 * 300
  elif bounds == "random":
    start = rng.integers(0, keys, size=place.shape)
    end = rng.integers(0, keys + 1, size=place.shape)
  return (
    jnp.asarray(q, dtype),
    jnp.asarray(k, dtype),
    jnp.asarray(w),
    jnp.asarray(start, jnp.int32),
    jnp.asarray(end, jnp.int32),
  ), jnp.asarray(rng.uniform(0.5, 2, size=(batch, keys)), jnp.float32)


@functools.partial(jax.jit, static_argnames=("implementation",))
def scores(args, scale, implementation="mosaic_gpu"):
  return pallas_kernels.indexer_scores(
    *args, key_scale=scale, implementation=implementation
  )


@functools.partial(jax.jit, static_argnames=("k",))
def topk(args, scale, k):
  return pallas_kernels.indexer_topk(
    *args, k=k, key_scale=scale, implementation="mosaic_gpu"
  )


@functools.partial(jax.jit, static_argnames=("k",))
def reference_topk(scores, k):
  return topk_reference.top_k(scores, k, None)


class GeneratedCasesTest(parameterized.TestCase):
  def check(self, args, scale, k):
    """Scores against float32 products, the selection against the scores'."""
    actual = scores(args, scale)
    widened = tuple(x.astype(jnp.float32) for x in args[:2]) + args[2:]
    expected = scores(widened, scale, "xla")
    # What a score would be if all its terms had one sign.
    size = scores((*map(jnp.abs, widened[:3]), *args[3:]), scale, "xla")
    np.testing.assert_array_equal(actual == -jnp.inf, expected == -jnp.inf)
    tolerance = _ROUNDING[args[0].dtype.name]
    error = jnp.where(expected > -jnp.inf, jnp.abs(actual - expected), 0)
    limit = jnp.where(size > -jnp.inf, size, 0) * tolerance
    self.assertLessEqual(float(jnp.max(error - limit)), 0)
    np.testing.assert_array_equal(
      topk(args, scale, k), reference_topk(actual, k)
    )

  @parameterized.parameters(*range(7))
  def test_random_shapes(self, seed):
    rng = np.random.default_rng(seed)
    shape = (
      int(rng.integers(1, 4)),
      int(rng.choice([1, 2, 5, 31, 64, 65, 100, 200])),
      int(rng.choice([1, 60, 384, 1000, 3001, 5000])),
      int(rng.choice([1, 8, 20, 32, 64])),
      int(rng.choice([16, 64, 100, 128])),
    )
    bounds = ("causal", "segments", "random")[seed % 3]
    args, scale = inputs(rng, shape, _DTYPES[seed % 2], bounds)
    self.check(args, scale if seed % 4 < 2 else None, int(rng.integers(1, 999)))

  @parameterized.parameters(
    (jnp.bfloat16, (1, 512, 32768, 64, 128)),
    (jnp.float8_e4m3fn, (1, 512, 32768, 32, 128)),
    (jnp.bfloat16, (4, 1, 131072, 64, 128)),
    (jnp.float8_e4m3fn, (4, 2, 131072, 32, 128)),
  )
  def test_real_shapes(self, dtype, shape):
    args, scale = inputs(np.random.default_rng(0), shape, dtype, "causal")
    self.check(args, scale, 2048)

  @parameterized.parameters(
    (jnp.bfloat16, (2, 200, 5001, 32, 128)),
    (jnp.float8_e4m3fn, (3, 1, 40000, 32, 128)),
  )
  def test_bit_equal_over_20_runs(self, dtype, shape):
    args, scale = inputs(np.random.default_rng(1), shape, dtype, "random")
    first = scores(args, scale), topk(args, scale, 512)
    for _ in range(20):
      again = scores(args, scale), topk(args, scale, 512)
      jax.tree.map(np.testing.assert_array_equal, first, again)

  def test_gradients_are_those_of_xla(self):
    args, scale = inputs(
      np.random.default_rng(2), (2, 150, 600, 16, 64), jnp.bfloat16, "segments"
    )

    def loss(q, k, w, implementation):
      out = scores((q, k, w, *args[3:]), scale, implementation)
      return jnp.sum(jnp.where(out > -jnp.inf, jnp.sin(out / 8), 0.0))

    grads = [
      jax.grad(functools.partial(loss, implementation=name), (0, 1, 2))(
        *args[:3]
      )
      for name in ("mosaic_gpu", "xla")
    ]
    for a, b in zip(*grads, strict=True):
      self.assertTrue(bool(jnp.any(a != 0)))
      np.testing.assert_allclose(
        np.asarray(a, np.float32),
        np.asarray(b, np.float32),
        **tolerances.tolerance("bfloat16", 16, grads=True),
      )


if __name__ == "__main__":
  absltest.main()
