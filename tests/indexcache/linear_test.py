# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from indexcache_jax import linear
from tests import tolerances
from tests.indexcache import toy

DEPTH = 96


def as_on_a_gpu():
  """Its forms for one token, which any device can run."""
  return mock.patch.object(
    jax.lax,
    "platform_dependent",
    lambda *args, cuda, default: cuda(*args),
  )


class OneTokenTest(parameterized.TestCase):
  # Depths that halve three times, once, never.
  @parameterized.parameters(96, 10, 7)
  def test_float32_product(self, depth):
    rng = np.random.default_rng(0)
    row, kernel = rng.normal(size=(1, 1, depth)), rng.normal(size=(depth, 5))
    with as_on_a_gpu():
      actual = linear.float32_product(jnp.float32(row), jnp.float32(kernel))
    np.testing.assert_allclose(
      actual, row @ kernel, **tolerances.tolerance("float32", depth)
    )

  @parameterized.parameters("float32", "bfloat16")
  def test_by_head(self, dtype):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(1, 1, 3, DEPTH)), dtype)
    kernel = jnp.asarray(rng.normal(size=(DEPTH, 3, 4)), dtype)
    config = toy.config(dtype=rows.dtype)
    several = linear.by_head(config, jnp.repeat(rows, 2, axis=1), kernel)
    with as_on_a_gpu():
      one = linear.by_head(config, rows, kernel)
    self.assertEqual((one.shape, one.dtype), ((1, 1, 3, 4), rows.dtype))
    expected = np.einsum(
      "btnv,vnd->btnd", *(np.asarray(x, np.float64) for x in (rows, kernel))
    )
    for actual in (one, several[:, :1]):
      np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        expected,
        **tolerances.tolerance(dtype, DEPTH),
      )

  def test_dense(self):
    rows = jnp.arange(DEPTH, dtype=jnp.float32).reshape(1, 1, DEPTH)
    layer = linear.dense(toy.config(), 3, "dense")
    params = layer.init(jax.random.key(0), rows)
    with as_on_a_gpu():
      one = layer.apply(params, rows)
    np.testing.assert_allclose(
      one, layer.apply(params, rows), **tolerances.tolerance("float32", DEPTH)
    )


class Float32ProductTest(parameterized.TestCase):
  @parameterized.product(
    rows_dtype=("float32", "bfloat16"),
    kernel_dtype=("float32", "bfloat16"),
    # One token, and more.
    leading=((1, 1), (2, 5)),
  )
  def test_is_as_near_float64_as_float32(
    self, rows_dtype, kernel_dtype, leading
  ):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(*leading, DEPTH)), rows_dtype)
    kernel = jnp.asarray(rng.normal(size=(DEPTH, 7)), kernel_dtype)
    actual = jax.jit(linear.float32_product)(rows, kernel)
    self.assertEqual(actual.dtype, jnp.float32)
    np.testing.assert_allclose(
      actual,
      np.asarray(rows, np.float64) @ np.asarray(kernel, np.float64),
      **tolerances.tolerance("float32", DEPTH),
    )

  def test_gradients_have_the_dtypes_of_what_they_are_of(self):
    rows = jnp.ones((3, DEPTH), jnp.bfloat16)
    layer = linear.Float32Dense(toy.config(param_dtype=jnp.bfloat16), 2)
    params = layer.init(jax.random.key(0), rows)
    grads, grad_rows = jax.grad(
      lambda params, rows: layer.apply(params, rows).sum(), argnums=(0, 1)
    )(params, rows)
    np.testing.assert_array_equal(
      grads["params"]["kernel"], jnp.full((DEPTH, 2), 3, jnp.bfloat16)
    )
    self.assertEqual(grad_rows.dtype, jnp.bfloat16)


if __name__ == "__main__":
  absltest.main()
