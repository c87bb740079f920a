# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`sparse_mla` on the GPU: selections of every kind, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from pallas_kernels.sparse_attention import shapes
from tests import tolerances
from tests.gpu import device, float64, generated

_SCALE = 0.05
# Every number of heads that the kernels tell apart; decoding, whose rows are
# split; other widths.
_SHAPES = (
  shapes.Shape(1, 140, 700, 64, 576, 512, 384),
  shapes.Shape(1, 133, 500, 128, 576, 512, 256),
  shapes.Shape(1, 136, 700, 20, 576, 512, 300),
  shapes.Shape(2, 80, 500, 8, 576, 512, 128),
  shapes.Shape(1, 140, 500, 32, 576, 512, 200),
  shapes.Shape(1, 140, 500, 33, 576, 512, 200),
  shapes.Shape(1, 134, 500, 96, 576, 512, 130),
  shapes.Shape(3, 1, 3000, 64, 576, 512, 2048),
  shapes.Shape(4, 2, 2500, 20, 576, 512, 2048),
  shapes.Shape(2, 70, 400, 12, 300, 256, 130),
  shapes.Shape(2, 128, 1024, 8, 128, 96, 256),
  shapes.Shape(2, 70, 60, 1, 70, 3, 100),
)
# Factors of the queries: one has nearly one key a head.
_SHARPNESS = (1, 1, 20)
_ERROR = 4e-3


def setUpModule():
  device.require_hopper()


class SparseMLAGeneratedTest(parameterized.TestCase):
  IMPLEMENTATION = "mosaic_gpu"

  @parameterized.parameters(*_SHAPES)
  def test_queries(self, *shape):
    shape = shapes.Shape(*shape)
    for query, latent, indices in self.draws(shape):
      actual = self.attend(shape, query, generated.poisoned(latent), indices)
      self.check(shape, actual, (query, latent, indices))

  def draws(self, shape):
    """Arguments of each sharpness."""
    rng = np.random.default_rng(sum(shape))
    for sharpness in _SHARPNESS:
      query = sharpness * self.query(rng, shape)
      latent = generated.normal(
        rng, shape.batch, shape.num_keys, shape.latent_dim
      )
      indices = generated.selections(
        rng, shape.batch, shape.num_queries, shape.num_keys, shape.k
      )
      yield query, latent, indices

  @parameterized.parameters(
    # Together 3, 2, 4; two sequences whose queries these do not divide.
    shapes.Shape(1, 400, 700, 20, 576, 512, 300),
    shapes.Shape(1, 270, 500, 32, 576, 512, 200),
    shapes.Shape(2, 275, 400, 8, 192, 128, 129),
    shapes.Shape(2, 205, 3000, 20, 576, 512, 2048),
  )
  def test_neighbours_share_rows(self, *shape):
    shape = shapes.Shape(*shape)
    for query, latent, indices in self.draws(shape):
      # As `indexer_topk` has them; some select what the query before does.
      indices = np.where(indices < 0, shape.num_keys, indices)
      indices = np.sort(indices, axis=-1)
      indices[:, 1::4] = indices[:, ::4][:, : indices[:, 1::4].shape[1]]
      indices = np.where(indices == shape.num_keys, -1, indices)
      args = (query, generated.poisoned(latent), jnp.asarray(indices))
      actual = self.attend(shape, *args, shares_rows=True)
      self.check(shape, actual, (query, latent, indices))
      again = self.attend(shape, *args, shares_rows=True)
      jax.tree.map(np.testing.assert_array_equal, again, actual)

  def query(self, rng, shape):
    return generated.normal(
      rng, shape.batch, shape.num_queries, shape.heads, shape.latent_dim
    )

  def attend(self, shape, *args, **kwargs):
    """Output, log-sum-exp and mean probabilities."""
    run = generated.jitted(
      "sparse_mla",
      self.IMPLEMENTATION,
      scale=_SCALE,
      value_dim=shape.value_dim,
      return_residuals=True,
      **kwargs,
    )
    out, residuals = run(*args)
    return out, *residuals

  def check(self, shape, actual, args):
    expected = float64.sparse_mla(
      *args, scale=_SCALE, value_dim=shape.value_dim
    )
    out, *residuals = (np.asarray(x, np.float64) for x in actual)
    np.testing.assert_allclose(
      out, expected[0], **tolerances.tolerance("bfloat16")
    )
    error = np.linalg.norm(out - expected[0])
    self.assertLessEqual(error, _ERROR * np.linalg.norm(expected[0]))
    tolerance = tolerances.tolerance("float32", shape.latent_dim)
    for name, a, b in zip(
      ("log_sum_exp", "mean_probs"), residuals, expected[1:], strict=True
    ):
      np.testing.assert_allclose(a, b, **tolerance, err_msg=name)
    device.count_cases(shape.batch * shape.num_queries)

  @parameterized.parameters(64, 20)
  def test_a_cache_of_a_million_rows(self, heads):
    shape = shapes.Shape(1, 136, 1 << 20, heads, 576, 512, 512)
    rng = np.random.default_rng(heads)
    latent = jax.jit(
      lambda key: jax.random.normal(
        key, (1, shape.num_keys, shape.latent_dim), jnp.bfloat16
      )
    )(jax.random.key(heads))
    query = self.query(rng, shape)
    indices = generated.selections(
      rng, 1, shape.num_queries, shape.num_keys, shape.k
    )
    # The last row of all, too.
    indices = indices.at[:, :, 0].set(shape.num_keys - 1)
    actual = self.attend(shape, query, latent, indices)
    few = slice(0, 16)
    self.check(
      shape._replace(num_queries=16),
      [x[:, few] for x in actual],
      (query[:, few], *compact(latent, indices[:, few])),
    )


def compact(latent, indices):
  """The rows that are selected alone, and the indices among them."""
  chosen = np.unique(np.maximum(indices, 0))
  places = np.searchsorted(chosen, np.maximum(indices, 0))
  return latent[:, chosen], jnp.where(indices >= 0, places, -1)


if __name__ == "__main__":
  device.main()
