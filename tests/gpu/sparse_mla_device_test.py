# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`sparse_mla` on the GPU: the op's contract, and drawn shapes in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.sparse_attention import shapes
from tests import tolerances
from tests.gpu import device
from tests.kernels import loops, sparse_attention_test

_SCALE = 0.05
# The first rows of each cache are NaN, and nobody selects them.
_POISONED = 3
_REPEATS = 20


def setUpModule():
  device.require_hopper()


def inputs(shape, seed=0):
  """Random arrays; lengths from 0 to k, with holes, at random places."""
  rng = np.random.default_rng(seed)
  keys = jax.random.split(jax.random.key(seed))
  leading = (shape.batch, shape.num_queries)
  query = jax.random.normal(keys[0], (*leading, shape.heads, shape.latent_dim))
  latent = jax.random.normal(
    keys[1], (shape.batch, shape.num_keys, shape.latent_dim)
  )
  places = rng.random((*leading, max(shape.num_keys, shape.k)), np.float32)
  indices = np.argsort(places, axis=-1)[..., : shape.k]
  lengths = rng.integers(0, shape.k + 1, size=(*leading, 1))
  lengths[:, ::3] = shape.k
  lengths[:, 5:6] = 0
  selected = (
    (np.arange(shape.k) < lengths)
    & (rng.random(indices.shape) > 0.1)
    & (indices >= _POISONED)
    & (indices < shape.num_keys)
  )
  return (
    query.astype(jnp.bfloat16),
    latent.at[:, :_POISONED].set(jnp.nan).astype(jnp.bfloat16),
    jnp.asarray(np.where(selected, indices, -1), jnp.int32),
  )


class DrawnCasesTest(parameterized.TestCase):
  def assert_right(self, args, value_dim=512):
    """Against float64 at some queries; bit-equal from run to run."""
    attend = sparse_attention_test.jitted("mosaic_gpu", _SCALE, value_dim)
    actual = attend(*args)
    for _ in range(_REPEATS):
      equal = jax.tree.map(jnp.array_equal, attend(*args), actual)
      self.assertTrue(all(jax.tree.leaves(equal)))
    query, latent, indices = args
    count = query.shape[1]
    places = np.unique([*range(min(7, count)), count // 2, count - 1])
    expected = loops.sparse_mla(
      np.asarray(query[:, places], np.float32),
      np.asarray(latent, np.float32),
      indices[:, places],
      _SCALE,
      value_dim,
    )
    out, residuals = actual
    self.assertFalse(jnp.isnan(out).any())
    np.testing.assert_allclose(
      np.asarray(out[:, places], np.float32),
      expected[0],
      **tolerances.tolerance("bfloat16"),
    )
    for array, want in zip(residuals, expected[1:], strict=True):
      np.testing.assert_allclose(
        array[:, places],
        want,
        **tolerances.tolerance("float32", query.shape[-1]),
      )

  @parameterized.parameters(
    # In the order of trust: what hangs takes the rest with it.
    shapes.Shape(1, 300, 4096, 64, 576, 512, 2048),
    shapes.Shape(1, 150, 4096, 128, 576, 512, 2048),
    shapes.Shape(8, 1, 8192, 64, 576, 512, 2048),
    shapes.Shape(1, 1, 8192, 20, 576, 512, 2048),
    shapes.Shape(3, 70, 1000, 96, 576, 512, 300),
    shapes.Shape(1, 150, 500, 33, 512, 500, 200),
    shapes.Shape(1, 300, 4096, 20, 576, 512, 2048),
    shapes.Shape(2, 150, 500, 8, 192, 128, 129),
    shapes.Shape(2, 150, 500, 1, 70, 3, 600),
  )
  def test_shapes(self, *shape):
    shape = shapes.Shape(*shape)
    self.assert_right(inputs(shape), shape.value_dim)

  @parameterized.parameters(64, 20)
  def test_large_logits(self, heads):
    shape = shapes.Shape(1, 300, 4096, heads, 576, 512, 2048)
    query, latent, indices = inputs(shape)
    self.assert_right((20 * query, latent, indices))

  @parameterized.parameters(64, 20)
  def test_many_queries(self, heads):
    shape = shapes.Shape(1, 4096, 32768, heads, 576, 512, 2048)
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (1, 4096, heads, 576), jnp.bfloat16)
    latent = jax.random.normal(keys[1], (1, 32768, 576), jnp.bfloat16)
    indices = jax.random.randint(keys[2], (1, 4096, 2048), -1, shape.num_keys)
    self.assert_right((query, latent, indices))


class SparseMLADeviceTest(sparse_attention_test.SparseMLATest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPES = ("bfloat16",)
  GRADS_REPEAT = False


if __name__ == "__main__":
  absltest.main()
