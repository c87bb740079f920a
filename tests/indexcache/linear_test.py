# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from indexcache_jax import linear
from tests import tolerances
from tests.indexcache import toy

DEPTH = 96


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
