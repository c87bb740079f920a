# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of `sparse_mla` on the GPU: many selections, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import pallas_kernels
from pallas_kernels.sparse_attention import shapes
from tests.gpu import device, float64, generated
from tests.kernels import gradient_loops

_SCALE = 0.05
_SHAPES = (
  shapes.Shape(1, 140, 700, 64, 576, 512, 256),
  shapes.Shape(1, 133, 500, 128, 576, 512, 128),
  shapes.Shape(2, 70, 400, 20, 576, 512, 200),
  shapes.Shape(1, 140, 60, 8, 192, 128, 64),
  shapes.Shape(2, 128, 1024, 8, 128, 96, 256),
  shapes.Shape(1, 1, 5000, 64, 576, 512, 2048),
)
_ROUNDS = 3
# Of all gradients and of a query's own, whose terms may cancel.
_ERROR, _ERROR_OF_A_QUERY = 1e-2, 3e-2


def setUpModule():
  device.require_hopper()


@functools.partial(jax.jit, static_argnames=("implementation",))
def gradients(query, latent, indices, grad_out, grad_lse, implementation):
  """Of query and latent, of the op with its log-sum-exp."""

  def attend(query, latent):
    out, residuals = pallas_kernels.sparse_mla(
      query,
      latent,
      indices,
      scale=_SCALE,
      value_dim=grad_out.shape[-1],
      return_residuals=True,
      implementation=implementation,
    )
    return out, residuals.log_sum_exp

  _, vjp = jax.vjp(attend, query, latent)
  return vjp((grad_out, grad_lse))


class SparseMLABackwardGeneratedTest(parameterized.TestCase):
  IMPLEMENTATION = "mosaic_gpu"

  @parameterized.parameters(*_SHAPES)
  def test_queries(self, *shape):
    shape = shapes.Shape(*shape)
    rng = np.random.default_rng(sum(shape))
    for _ in range(_ROUNDS):
      query, latent, indices, *grads = arguments(rng, shape)
      actual = gradients(
        query,
        generated.poisoned(latent),
        indices,
        *grads,
        implementation=self.IMPLEMENTATION,
      )
      expected = float64.sparse_mla_gradients(
        query, latent, indices, *grads, scale=_SCALE
      )
      self.check(actual, expected)
      nobodys = np.asarray(actual[1][:, : generated.UNSELECTED], np.float32)
      np.testing.assert_array_equal(nobodys, 0)
      device.count_cases(shape.batch * shape.num_queries)

  def check(self, actual, expected):
    for a, b in zip(actual, expected, strict=True):
      self.assertEqual(a.dtype, jnp.bfloat16)
      self.assertLess(gradient_loops.relative_error(a, b), _ERROR)
    a, b = np.asarray(actual[0], np.float64), expected[0]
    error, size = (np.linalg.norm(x, axis=(2, 3)) for x in (a - b, b))
    limit = np.maximum(size, np.mean(size)) * _ERROR_OF_A_QUERY
    self.assertEmpty(np.argwhere(error > limit).tolist())


def arguments(rng, shape):
  """Query, latent, indices, and gradients of output and log-sum-exp."""
  leading = (shape.batch, shape.num_queries)
  return (
    generated.normal(rng, *leading, shape.heads, shape.latent_dim),
    generated.normal(rng, shape.batch, shape.num_keys, shape.latent_dim),
    generated.selections(rng, *leading, shape.num_keys, shape.k),
    generated.normal(rng, *leading, shape.heads, shape.value_dim),
    generated.normal(rng, *leading, shape.heads, dtype=jnp.float32),
  )


if __name__ == "__main__":
  device.main()
