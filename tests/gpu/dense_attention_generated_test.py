# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense attention's statistics on the GPU, against float64."""

import jax
import numpy as np
from absl.testing import parameterized

from pallas_kernels.dense_attention import shapes
from tests import tolerances
from tests.gpu import device, float64, generated

_SCALE = 0.06
_SHAPES = (
  shapes.Shape(1, 256, 2048, 64, 576),
  shapes.Shape(1, 130, 3000, 20, 576),
  shapes.Shape(2, 300, 777, 5, 64),
  shapes.Shape(1, 128, 1000, 128, 576),
  shapes.Shape(2, 129, 100, 1, 16),
  shapes.Shape(1, 8, 131072, 20, 576),
  shapes.Shape(1, 1, 9001, 2, 128),
)
_ROUNDS = 2
_REPEATS = 20


def setUpModule():
  device.require_hopper()


def arguments(rng, shape):
  return (
    generated.normal(
      rng, shape.batch, shape.num_queries, shape.heads, shape.latent_dim
    ),
    generated.normal(rng, shape.batch, shape.num_keys, shape.latent_dim),
    *generated.bounds(rng, shape.batch, shape.num_queries, shape.num_keys),
  )


class DenseAttentionGeneratedTest(parameterized.TestCase):
  IMPLEMENTATION = "mosaic_gpu"

  def residuals(self, args):
    run = generated.jitted(
      "dense_mla_residuals", self.IMPLEMENTATION, scale=_SCALE
    )
    return run(*args)

  @parameterized.parameters(*_SHAPES)
  def test_queries(self, *shape):
    shape = shapes.Shape(*shape)
    rng = np.random.default_rng(sum(shape))
    tolerance = tolerances.tolerance("float32", 64)
    for _ in range(_ROUNDS):
      args = arguments(rng, shape)
      expected = float64.dense_mla_residuals(*args, scale=_SCALE)
      for name, a, b in zip(
        ("log_sum_exp", "mean_probs"),
        self.residuals(args),
        expected,
        strict=True,
      ):
        np.testing.assert_allclose(a, b, **tolerance, err_msg=name)
      device.count_cases(shape.batch * shape.num_queries)

  def test_bit_equal_over_20_runs(self):
    shape = shapes.Shape(2, 200, 9001, 8, 576)
    args = arguments(np.random.default_rng(1), shape)
    first = self.residuals(args)
    for _ in range(_REPEATS):
      jax.tree.map(np.testing.assert_array_equal, self.residuals(args), first)


if __name__ == "__main__":
  device.main()
