# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`sparse_mla` of float8 latents on the GPU: what it gives of the widened rows.

Bit for bit, and from run to run; some queries also against float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import pallas_kernels
from pallas_kernels.sparse_attention import shapes
from tests import tolerances
from tests.gpu import device, float64, generated

_SCALE = 0.05
# In the order of trust: what hangs or is illegal takes the rest with it. The
# least, decoding, prefill; heads of every kernel; odd sizes.
_SHAPES = (
  shapes.Shape(1, 1, 150, 64, 320, 256, 128),
  shapes.Shape(8, 1, 8192, 64, 576, 512, 2048),
  shapes.Shape(1, 300, 4096, 64, 576, 512, 2048),
  shapes.Shape(1, 150, 4096, 128, 576, 512, 2048),
  shapes.Shape(1, 300, 4096, 20, 576, 512, 2048),
  shapes.Shape(3, 70, 1000, 96, 576, 512, 300),
  shapes.Shape(2, 150, 500, 33, 290, 256, 129),
  shapes.Shape(2, 70, 60, 1, 330, 256, 100),
)
# With it the one query of the first shape has rows, and the eight that decode
# have all, holes, few, one and none.
_SEED = 0
_REPEATS = 20
# Queries of each cache that are compared with float64.
_FEW = 7


def setUpModule():
  device.require_hopper()


def inputs(shape):
  """Queries, quantized latents, NaN where nobody selects, and indices."""
  rng = np.random.default_rng(_SEED)
  query = generated.normal(
    rng, shape.batch, shape.num_queries, shape.heads, shape.latent_dim
  )
  latent = generated.normal(rng, shape.batch, shape.num_keys, shape.latent_dim)
  latents = pallas_kernels.quantize_latents(
    generated.poisoned(latent), shape.value_dim
  )
  indices = generated.selections(
    rng, shape.batch, shape.num_queries, shape.num_keys, shape.k
  )
  return query, latents, indices


class SparseMLAFloat8Test(parameterized.TestCase):
  IMPLEMENTATION = "mosaic_gpu"

  @parameterized.parameters(*_SHAPES)
  def test_equals_the_widened_rows(self, *shape):
    shape = shapes.Shape(*shape)
    query, latents, indices = inputs(shape)
    attend = generated.jitted(
      "sparse_mla",
      self.IMPLEMENTATION,
      scale=_SCALE,
      value_dim=shape.value_dim,
      return_residuals=True,
    )
    actual = attend(query, latents, indices)
    for _ in range(_REPEATS):
      self.assert_equal(attend(query, latents, indices), actual)
    rows = pallas_kernels.dequantize_latents(latents)
    self.assert_equal(attend(query, rows, indices), actual)
    few = slice(0, _FEW)
    self.check(
      shape,
      jax.tree.map(lambda x: x[:, few], actual),
      # A mask of float64 would multiply the NaN.
      (
        query[:, few],
        rows.at[:, : generated.UNSELECTED].set(0),
        indices[:, few],
      ),
    )

  def assert_equal(self, actual, expected):
    """Compares on the GPU: the host takes seconds for so many bfloat16."""
    equal = jax.tree.map(jnp.array_equal, actual, expected)
    self.assertTrue(all(jax.tree.leaves(equal)), equal)

  def check(self, shape, actual, args):
    expected = float64.sparse_mla(
      *args, scale=_SCALE, value_dim=shape.value_dim
    )
    out, residuals = actual
    np.testing.assert_allclose(
      np.asarray(out, np.float64),
      expected[0],
      **tolerances.tolerance("bfloat16"),
    )
    tolerance = tolerances.tolerance("float32", shape.latent_dim)
    for name, a, b in zip(
      ("log_sum_exp", "mean_probs"), residuals, expected[1:], strict=True
    ):
      np.testing.assert_allclose(a, b, **tolerance, err_msg=name)
    device.count_cases(shape.batch * min(shape.num_queries, _FEW))


if __name__ == "__main__":
  device.main()
