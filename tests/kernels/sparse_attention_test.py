# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import chunking
from pallas_kernels.sparse_attention import shapes
from tests import tolerances
from tests.kernels import errors, loops


def inputs(shape, dtype=jnp.float32, seed=0):
  """Random queries and rows; row lengths of the selection vary from 0."""
  rng = np.random.default_rng(seed)
  indices = np.full((shape.batch, shape.num_queries, shape.k), -1, np.int32)
  for place in np.ndindex(indices.shape[:2]):
    count = min(place[1], shape.k, shape.num_keys)
    chosen = rng.permutation(shape.num_keys)[:count]
    indices[place][:count] = np.sort(chosen)
  return (
    jnp.asarray(
      rng.normal(
        size=(shape.batch, shape.num_queries, shape.heads, shape.latent_dim)
      ),
      dtype,
    ),
    jnp.asarray(
      rng.normal(size=(shape.batch, shape.num_keys, shape.latent_dim)), dtype
    ),
    jnp.asarray(indices),
  )


@functools.cache
def jitted(implementation, scale, value_dim):
  """The op with its residuals; once, for a GPU kernel takes long to compile."""
  return jax.jit(
    lambda *args: pallas_kernels.sparse_mla(
      *args,
      scale=scale,
      value_dim=value_dim,
      return_residuals=True,
      implementation=implementation,
    )
  )


def assert_results_close(actual, expected, out_tolerance, reduction):
  """Compares output and float32 residuals with a loop's."""
  out, residuals = actual
  np.testing.assert_allclose(
    np.asarray(out, np.float32), expected[0], **out_tolerance
  )
  for a, b in zip(residuals, expected[1:], strict=True):
    np.testing.assert_allclose(
      a, b, **tolerances.tolerance("float32", reduction)
    )


class SparseMLATest(parameterized.TestCase):
  """The op's contract.

  Attributes:
    IMPLEMENTATION: as named to the op.
    DTYPES: that it takes; most tests run in the first.
    GRADS_REPEAT: whether gradients are bit-equal from run to run.
  """

  IMPLEMENTATION = "xla"
  DTYPES = ("float32", "bfloat16")
  GRADS_REPEAT = True

  def inputs(self, shape):
    return inputs(shape, self.DTYPES[0])

  def tolerance(self, reduction, grads=False):
    dtype = self.DTYPES[0]
    # In bfloat16 the rounding of inputs and results outweighs the sums.
    terms = 4 if dtype == "bfloat16" else reduction
    return tolerances.tolerance(dtype, terms, grads=grads)

  def assert_close(self, a, b, **tolerance):
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), **tolerance
    )

  def attend(self, *args, scale=0.3, value_dim=16):
    return jitted(self.IMPLEMENTATION, scale, value_dim)(*args)

  @parameterized.product(
    shape=(
      shapes.SHAPES["tiny"],
      shapes.Shape(1, 1, 50, 20, 24, 16, 9),
      shapes.Shape(3, 17, 5, 3, 19, 16, 11),
    ),
    dtype=("float32", "bfloat16"),
  )
  def test_equals_a_float64_loop(self, shape, dtype):
    if dtype not in self.DTYPES:
      self.skipTest(f"not an implementation for {dtype}")
    args = inputs(shape, dtype)
    out, residuals = self.attend(*args)
    expected = loops.sparse_mla(*args, 0.3, 16)
    self.assertEqual(out.dtype, jnp.dtype(dtype))
    reduction = shape.latent_dim + shape.k
    for residual in residuals:
      self.assertEqual(residual.dtype, jnp.float32)
    terms = 4 if dtype == "bfloat16" else reduction
    assert_results_close(
      (out, residuals), expected, tolerances.tolerance(dtype, terms), reduction
    )

  def test_a_query_without_rows_is_zero(self):
    shape = shapes.SHAPES["tiny"]
    query, latent, indices = self.inputs(shape)
    out, residuals = self.attend(query, latent, jnp.full_like(indices, -1))
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(residuals.mean_probs, 0)
    np.testing.assert_array_equal(residuals.log_sum_exp, -np.inf)

  def test_nan_in_unselected_rows_touches_nothing(self):
    query, latent, indices = self.inputs(shapes.SHAPES["tiny"])
    indices = jnp.where(indices < 10, -1, indices)
    poisoned = latent.at[:, :10].set(jnp.nan)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(query, latent):
      out = pallas_kernels.sparse_mla(
        query,
        latent,
        indices,
        scale=0.3,
        value_dim=16,
        implementation=self.IMPLEMENTATION,
      )
      return jnp.sum(out.astype(jnp.float32) ** 2)

    value, grads = run(query, latent)
    poisoned_value, poisoned_grads = run(query, poisoned)
    np.testing.assert_array_equal(value, poisoned_value)
    for a, b in zip(grads, poisoned_grads, strict=True):
      if self.GRADS_REPEAT:
        np.testing.assert_array_equal(a, b)
      else:
        self.assert_close(a, b, **self.tolerance(32, grads=True))

  def test_order_of_the_indices_changes_rounding_only(self):
    query, latent, indices = self.inputs(shapes.SHAPES["tiny"])
    out, _ = self.attend(query, latent, indices)
    flipped, _ = self.attend(query, latent, indices[..., ::-1])
    self.assert_close(out, flipped, **self.tolerance(32))

  def test_gradients_are_those_of_masked_dense_attention(self):
    shape = shapes.Shape(1, 9, 14, 2, 12, 8, 6)
    query, latent, indices = self.inputs(shape)
    mask = (indices[..., None] == jnp.arange(14)).any(axis=2)

    def dense(query, latent):
      logits = 0.3 * jnp.einsum(
        "btnc,bsc->btns", query, latent, precision="highest"
      )
      logits = jnp.where(mask[:, :, None], logits, -1e30)
      probs = jnp.where(mask[:, :, None], jax.nn.softmax(logits), 0)
      return jnp.einsum(
        "btns,bsv->btnv", probs, latent[..., :8], precision="highest"
      )

    def sparse(query, latent):
      return pallas_kernels.sparse_mla(
        query,
        latent,
        indices,
        scale=0.3,
        value_dim=8,
        implementation=self.IMPLEMENTATION,
      )

    def grads(form, *args):
      def loss(*args):
        return jnp.sum(jnp.sin(form(*args).astype(jnp.float32)))

      return jax.jit(jax.grad(loss, (0, 1)))(*args)

    expected = grads(
      dense, query.astype(jnp.float32), latent.astype(jnp.float32)
    )
    for a, b in zip(grads(sparse, query, latent), expected, strict=True):
      self.assert_close(a, b, **self.tolerance(14 * 8, grads=True))

  def test_chunks_change_rounding_only(self):
    args = self.inputs(shapes.SHAPES["tiny"])
    whole, _ = self.attend(*args)
    original = chunking.CHUNK_BYTES
    self.addCleanup(setattr, chunking, "CHUNK_BYTES", original)
    chunking.CHUNK_BYTES = 4 * 2 * 24 * 8 * 5
    jitted.cache_clear()
    self.addCleanup(jitted.cache_clear)
    chunked, residuals = self.attend(*args)
    self.assert_close(whole, chunked, **self.tolerance(32))
    self.assertEqual(residuals.mean_probs.shape, args[2].shape)

  def test_run_to_run_bit_equal(self):
    args = self.inputs(shapes.SHAPES["tiny"])
    first, _ = self.attend(*args)
    for _ in range(3):
      np.testing.assert_array_equal(self.attend(*args)[0], first)

  def test_errors(self):
    query, latent, indices = self.inputs(shapes.SHAPES["tiny"])
    call = pallas_kernels.sparse_mla
    with errors.unchecked():
      with self.assertRaisesRegex(ValueError, r"kv_latent.shape=\(2, 40, 23\)"):
        call(query, latent[..., 1:], indices, scale=1.0, value_dim=4)
      with self.assertRaisesRegex(ValueError, r"indices.shape=\(2, 12, 8\)"):
        call(query, latent, indices[:, 1:], scale=1.0, value_dim=4)
      with self.assertRaisesRegex(ValueError, "value_dim=25 for a width of 24"):
        call(query, latent, indices, scale=1.0, value_dim=25)


if __name__ == "__main__":
  absltest.main()
