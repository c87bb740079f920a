# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Caches in the form that a TPU's kernel reads."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

import indexcache_jax as ic
from indexcache_jax import cache as cache_lib
from pallas_kernels import packing
from tests.indexcache import toy


def packed_cache(config, batch, capacity):
  with mock.patch.object(packing, "is_preferred", return_value=True):
    return ic.init_cache(config, batch, capacity)


class PackedCacheTest(absltest.TestCase):
  def test_numbers_are_those_of_a_plain_cache(self):
    # XLA's implementation: the same operations on the same rows, so any
    # difference would be the packing's.
    config = toy.config(
      "FSFS", dtype=jnp.dtype("bfloat16"), implementation="xla"
    )
    params = toy.params_for(config)
    tokens = toy.random_tokens(length=22)
    plain, packed = ic.init_cache(config, 2, 20), packed_cache(config, 2, 20)
    self.assertEqual(packed.capacity, 20)
    # The last tokens are beyond the capacity, and dropped.
    for begin, end in ((0, 13), (13, 22)):
      chunk = tokens[:, begin:end]
      expected, aux = toy.forward(config, params, chunk, cache=plain)
      plain = aux.cache
      actual, aux = toy.forward(config, params, chunk, cache=packed)
      packed = aux.cache
      np.testing.assert_array_equal(actual, expected)
    self.assertIsInstance(packed.kv_latent[0], cache_lib.PackedLatent)
    for rows, words in zip(plain.kv_latent, packed.kv_latent, strict=True):
      np.testing.assert_array_equal(cache_lib.plain_latents(words), rows)
      # Index -1 reads what stands behind the last token.
      np.testing.assert_array_equal(words.words[:, 20:], 0)
    new = tokens[:, :1]
    np.testing.assert_array_equal(
      toy.forward(config, params, new, kind="dense", cache=packed)[0],
      toy.forward(config, params, new, kind="dense", cache=plain)[0],
    )

  def test_bytes_are_those_of_whole_rows_of_words(self):
    config = ic.PRESETS["glm_5_2"]().replace(num_hidden_layers=2)
    cache = packed_cache(config, 3, 64)
    # 576 columns of bfloat16 take three rows of 128 words, and one more token
    # holds the zeros.
    self.assertEqual(cache.kv_latent[0].words.shape, (3, 64 * 3 + 8, 128))

  def test_a_cache_off_a_tpu_is_plain(self):
    cache = ic.init_cache(toy.config(), 1, 8)
    self.assertEqual(cache.kv_latent[0].shape, (1, 8, 24))


if __name__ == "__main__":
  absltest.main()
