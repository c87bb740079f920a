# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Latents packed as a TPU's kernel reads them: exact, and checked."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels as pk
from pallas_kernels import packing
from tests import tolerances
from tests.kernels import errors, interpreters, loops

_UNSIGNED = {"float32": jnp.uint32, "bfloat16": jnp.uint16}


def random(shape, dtype="float32"):
  values = np.random.default_rng(0).normal(size=shape)
  return jnp.asarray(values, dtype)


def bits(x):
  return np.asarray(
    jax.lax.bitcast_convert_type(x, _UNSIGNED[jnp.dtype(x.dtype).name])
  )


class RoundTripTest(parameterized.TestCase):
  @parameterized.product(
    width=(24, 128, 300, 576), dtype=("float32", "bfloat16")
  )
  def test_unpack_inverts_pack(self, width, dtype):
    latent = random((2, 5, width), dtype)
    packed = packing.pack(latent)
    self.assertEqual(packed.shape, latent.shape)
    np.testing.assert_array_equal(bits(packing.unpack(packed)), bits(latent))
    self.assertEqual(packed.words.shape[1] % 8, 0)
    tiles = packing.row_tiles(width, dtype)
    self.assertEqual(
      packing.padding_bytes(width, dtype),
      512 * tiles - width * jnp.dtype(dtype).itemsize,
    )
    # What index -1 reads.
    np.testing.assert_array_equal(packed.words[:, 5 * tiles :], 0)

  def test_every_pattern_of_16_bits_comes_back(self):
    # NaN with their payloads, -0.0, infinities and subnormal numbers.
    patterns = jnp.arange(1 << 16, dtype=jnp.uint16).reshape(2, 64, 512)
    latent = jax.lax.bitcast_convert_type(patterns, jnp.bfloat16)
    back = packing.unpack(packing.pack(latent))
    np.testing.assert_array_equal(bits(back), patterns)

  def test_float32_specials_come_back(self):
    patterns = [0x80000000, 1, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFFFFFFFF]
    patterns = jnp.asarray(patterns, jnp.uint32).reshape(1, 2, 3)
    latent = jax.lax.bitcast_convert_type(patterns, jnp.float32)
    back = packing.unpack(packing.pack(latent))
    np.testing.assert_array_equal(bits(back), patterns)

  @parameterized.parameters("float32", "bfloat16")
  def test_write_puts_tokens_at_their_places(self, dtype):
    latent = random((2, 5, 300), dtype)
    packed = packing.write(
      packing.empty(2, 5, 300, dtype),
      latent[:, :2],
      jnp.asarray([[0, 3], [4, 5]]),
    )
    expected = np.zeros(latent.shape, np.float32)
    expected[0, [0, 3]] = latent[0, :2]
    expected[1, 4] = latent[1, 0]  # Place 5 is beyond the last.
    np.testing.assert_array_equal(np.float32(packing.unpack(packed)), expected)
    tiles = packing.row_tiles(300, dtype)
    np.testing.assert_array_equal(packed.words[:, 5 * tiles :], 0)

  def test_writing_every_token_is_packing(self):
    latent = random((2, 5, 300), "bfloat16")
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    written = jax.jit(packing.write)(
      packing.empty(2, 5, 300, latent.dtype), latent, positions
    )
    np.testing.assert_array_equal(written.words, packing.pack(latent).words)


class ErrorsTest(parameterized.TestCase):
  def test_a_dtype_that_has_no_packed_form(self):
    message = r"must be bfloat16 or float32: got float16. Cast the rows"
    with self.assertRaisesRegex(NotImplementedError, message):
      packing.pack(jnp.zeros((1, 2, 3), jnp.float16))
    with self.assertRaisesRegex(NotImplementedError, message):
      packing.empty(1, 2, 3, jnp.float16)

  def test_sizes_below_one(self):
    with self.assertRaisesRegex(ValueError, "at least 1: got batch=1, num_k"):
      packing.empty(1, 0, 3, jnp.float32)

  def test_rows_that_do_not_fit_the_cache(self):
    packed = packing.empty(2, 5, 24, jnp.float32)
    positions = jnp.zeros((2, 3), jnp.int32)
    message = r"got kv_latent.shape=\(2, 3, 25"
    with errors.unchecked(), self.assertRaisesRegex(ValueError, message):
      packing.write(packed, jnp.zeros((2, 3, 25)), positions)
    message = r"got positions.shape=\(2, 2\)"
    with errors.unchecked(), self.assertRaisesRegex(ValueError, message):
      packing.write(packed, jnp.zeros((2, 3, 24)), positions[:, :2])

  def test_words_of_another_size(self):
    packed = packing.empty(2, 5, 24, jnp.float32)
    short = dataclasses.replace(packed, words=packed.words[:, :-1])
    message = r"must be \[B, 8, 128\]: got words.shape=\(2, 7, 128\). Make them"
    with self.assertRaisesRegex(ValueError, message):
      packing.unpack(short)
    with self.assertRaisesRegex(ValueError, message):
      attend(random((2, 1, 3, 24)), short)


class AttentionTest(parameterized.TestCase):
  def test_numbers_are_those_of_plain_rows(self):
    query, latent = random((2, 1, 3, 24)), random((2, 40, 24))
    indices = jnp.asarray([[[39, 0, -1]], [[-1, 7, 8]]])
    out, residuals = attend(query, packing.pack(latent), indices)
    expected = loops.sparse_mla(query, latent, indices, 0.3, 16)
    for actual, want in zip((out, *residuals), expected, strict=True):
      np.testing.assert_allclose(
        actual, want, **tolerances.tolerance("float32", 44)
      )

  @parameterized.parameters(
    ((2, 40, 25), "float32", r"packed.shape=\(2, 40, 25\)"),
    ((1, 40, 24), "float32", r"packed.shape=\(1, 40, 24\)"),
    ((2, 40, 24), "bfloat16", "packed.dtype=bfloat16, query.dtype=float32"),
  )
  def test_a_cache_of_another_batch_width_or_dtype(self, shape, dtype, message):
    with self.assertRaisesRegex(ValueError, message):
      attend(random((2, 1, 3, 24)), packing.empty(*shape, dtype))

  def test_packs_where_the_kernel_will_run(self):
    is_preferred = packing.is_preferred
    # No TPU here.
    self.assertFalse(is_preferred(jnp.bfloat16, None))
    self.assertFalse(is_preferred(jnp.bfloat16, "mosaic_tpu"))
    self.enter_context(interpreters.chip())
    self.assertTrue(is_preferred(jnp.bfloat16, "mosaic_tpu"))
    self.assertFalse(is_preferred(jnp.bfloat16, "xla"))
    self.assertFalse(is_preferred(jnp.float16, "mosaic_tpu"))
    self.enter_context(
      mock.patch.object(jax, "default_backend", return_value="tpu")
    )
    self.assertTrue(is_preferred(jnp.float32, None))


def attend(query, packed, indices=None):
  if indices is None:
    indices = jnp.zeros((*query.shape[:2], 3), jnp.int32)
  return pk.sparse_mla_packed(
    query,
    packed,
    indices,
    scale=0.3,
    value_dim=16,
    return_residuals=True,
    implementation="xla",
  )


if __name__ == "__main__":
  absltest.main()
