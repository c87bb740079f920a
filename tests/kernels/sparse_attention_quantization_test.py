# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.hopper import chip
from pallas_kernels.sparse_attention import quantization, shapes
from tests import tolerances
from tests.kernels import errors, loops, sparse_attention_test


def rounded(row, value_dim):
  """The definition, for one row, in float64."""
  row = np.array(row, np.float64)
  for begin in range(0, value_dim, quantization.BLOCK):
    block = slice(begin, min(begin + quantization.BLOCK, value_dim))
    largest = np.abs(row[block]).max()
    exponent = np.ceil(np.log2(largest / 448)) if largest else -110
    scale = 2.0 ** np.clip(exponent, -110, 7)
    values = np.clip(row[block] / scale, -448, 448)
    row[block] = values.astype(ml_dtypes.float8_e4m3fn).astype(float) * scale
  row[value_dim:] = row[value_dim:].astype(ml_dtypes.bfloat16)
  return row


def relative_error(a, b):
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  return np.linalg.norm(a - b) / np.linalg.norm(b)


class QuantizationTest(parameterized.TestCase):
  @parameterized.parameters((512, 576), (256, 320), (16, 24), (200, 200))
  def test_is_that_of_a_float64_loop(self, value_dim, width):
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(2, 5, width)) * 10.0 ** rng.integers(
      -6, 5, size=(2, 5, 1)
    )
    latent[0, 0] = 0
    latent[0, 1] = 448 * 2.0**-3
    latent = latent.astype(np.float32)
    quantized = pallas_kernels.quantize_latents(jnp.asarray(latent), value_dim)
    rows = pallas_kernels.dequantize_latents(quantized)
    self.assertEqual(quantized.shape, latent.shape)
    self.assertEqual(rows.dtype, jnp.bfloat16)
    for place in np.ndindex(2, 5):
      np.testing.assert_array_equal(
        np.asarray(rows[place], np.float64), rounded(latent[place], value_dim)
      )

  def test_rounds_once(self):
    latent = jax.random.normal(jax.random.key(0), (1, 9, 576))
    rows = latent
    for _ in range(2):
      previous = rows
      rows = pallas_kernels.dequantize_latents(
        pallas_kernels.quantize_latents(previous, 512)
      )
    np.testing.assert_array_equal(rows, previous)

  def test_range(self):
    latent = (
      jnp.zeros((1, 4, 192))
      .at[0, :, 5]
      .set(jnp.asarray([np.nan, np.inf, 1e6, 1e-30]))
    )
    rows = pallas_kernels.dequantize_latents(
      pallas_kernels.quantize_latents(latent, 128)
    )
    self.assertTrue(np.isnan(rows[0, :2, :128]).all())
    np.testing.assert_array_equal(rows[0, :2, 128:], 0)
    np.testing.assert_allclose(
      np.asarray(rows[0, 2:, 5], float), [57344, 1e-30], rtol=1 / 16
    )

  def test_a_nan_among_many_rows_makes_its_block_nan(self):
    latent = np.random.default_rng(0).normal(size=(64, 256))
    latent[:, ::7] = 0
    latent[5, 1] = np.nan
    quantized = pallas_kernels.quantize_latents(jnp.asarray(latent), 256)
    is_nan = np.isnan(np.asarray(quantized.scales, np.float32))
    np.testing.assert_array_equal(np.argwhere(is_nan), [[5, 0]])

  def test_errors(self):
    latent = jnp.zeros((1, 8, 192))
    quantized = pallas_kernels.quantize_latents(latent, 128)
    query, indices = jnp.zeros((1, 2, 4, 192)), jnp.zeros((1, 2, 4), jnp.int32)
    with self.assertRaisesRegex(ValueError, "value_dim=193 for a width of 192"):
      pallas_kernels.quantize_latents(latent, 193)
    with self.assertRaisesRegex(ValueError, "another `value_dim` than 64"):
      pallas_kernels.sparse_mla(
        query, quantized, indices, scale=1.0, value_dim=64
      )
    short = quantized._replace(scales=quantized.scales[:, 1:])
    with (
      errors.unchecked(),
      self.assertRaisesRegex(ValueError, r"got .*\(1, 7, 1\).* expected"),
    ):
      pallas_kernels.sparse_mla(query, short, indices, scale=1.0, value_dim=128)


class SparseMLATest(parameterized.TestCase):
  def attend(self, query, latent, indices, value_dim=16):
    return pallas_kernels.sparse_mla(
      query,
      latent,
      indices,
      scale=0.3,
      value_dim=value_dim,
      return_residuals=True,
      implementation="xla",
    )

  @parameterized.parameters("float32", "bfloat16")
  def test_equals_a_float64_loop_over_the_rounded_rows(self, dtype):
    shape = shapes.SHAPES["tiny"]
    query, latent, indices = sparse_attention_test.inputs(shape, "float32")
    query = query.astype(dtype)
    rows = np.apply_along_axis(rounded, -1, latent, shape.value_dim)
    expected = loops.sparse_mla(query, rows, indices, 0.3, shape.value_dim)
    quantized = pallas_kernels.quantize_latents(latent, shape.value_dim)
    out, residuals = self.attend(query, quantized, indices)
    self.assertEqual(out.dtype, jnp.dtype(dtype))
    sparse_attention_test.assert_results_close(
      (out, residuals),
      expected,
      tolerances.tolerance(dtype, 4),
      shape.latent_dim,
    )

  @parameterized.named_parameters(
    # As `quantize_latents` states; of 1 value in 100, 100 times the others; of
    # one 1e6 times the others, which leaves these nothing.
    ("normal", 1.0, 0.0, 0.035),
    ("outliers", 100.0, 0.01, 0.085),
    ("one_value_for_all", 1e6, 1 / 128, 1.0),
  )
  def test_error_of_outputs(self, factor, share, bound):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1, 2048, 576))
    rows[..., :512] *= np.where(rng.random((1, 2048, 512)) < share, factor, 1)
    rows = jnp.asarray(rows, jnp.float32)
    query = jnp.asarray(rng.normal(size=(1, 4, 16, 576)), jnp.float32)
    indices = jnp.asarray(
      [np.sort(rng.permutation(2048)[:512]) for _ in range(4)], jnp.int32
    )[None]
    # Logits of the same size for all.
    query *= 0.15 / jnp.sqrt(jnp.mean(rows**2))
    exact, _ = self.attend(query, rows, indices, 512)
    quantized = pallas_kernels.quantize_latents(rows, 512)
    out, _ = self.attend(query, quantized, indices, 512)
    error = relative_error(out, exact)
    self.assertLess(error, bound)
    self.assertGreater(error, bound / 3)

  def test_gradient_is_the_querys_alone(self):
    query, latent, indices = sparse_attention_test.inputs(shapes.SHAPES["tiny"])
    quantized = pallas_kernels.quantize_latents(latent, 16)
    rows = pallas_kernels.dequantize_latents(quantized).astype(jnp.float32)

    def loss(query, latent):
      return jnp.sum(jnp.sin(self.attend(query, latent, indices)[0]))

    grad = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(
      grad(query, quantized),
      grad(query, rows),
      **tolerances.tolerance("float32", 8, grads=True),
    )
    with self.assertRaisesRegex(ValueError, "in `query` alone"):
      jax.jit(jax.grad(loss, 1))(query, quantized)
    with self.assertRaisesRegex(ValueError, "in `query` alone"):
      jax.grad(
        lambda latent: loss(query, pallas_kernels.quantize_latents(latent, 16))
      )(latent)

  @parameterized.parameters(
    ("mosaic_gpu", "multiple of 256 values"),
    ("mosaic_tpu", "got QuantizedLatents"),
  )
  def test_kernels_say_that_they_cannot(self, implementation, message):
    device = chip.Chip("NVIDIA H200", 132)
    self.enter_context(mock.patch.object(chip, "chip", lambda: device))
    query, latent, indices = sparse_attention_test.inputs(shapes.SHAPES["tiny"])
    quantized = pallas_kernels.quantize_latents(latent, 16)
    with self.assertRaisesRegex(NotImplementedError, message):
      pallas_kernels.sparse_mla(
        query,
        quantized,
        indices,
        scale=0.3,
        value_dim=16,
        implementation=implementation,
      )


if __name__ == "__main__":
  absltest.main()
