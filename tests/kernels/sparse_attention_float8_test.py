# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Float8 latents in the GPU form of sparse MLA.

How a warpgroup widens rows in shared memory, in NumPy; and the entry, with a
plain form of the kernels. `sparse_attention_mosaic_gpu_test` interprets them,
and `tests/gpu/sparse_mla_float8_test` runs them on a GPU.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.hopper import float8_rows
from pallas_kernels.sparse_attention import mosaic_gpu, shapes
from tests import tolerances
from tests.kernels import (
  errors,
  loops,
  sparse_attention_mosaic_gpu_test,
  sparse_attention_test,
)


class _Memory:
  """Shared memory that the threads of a warpgroup touch in lock step.

  Attributes:
    words: its words of 4 bytes.
  """

  def __init__(self, words, thread):
    self.words = words
    self._thread = thread
    # The last thread to read each word since the warps synchronized.
    self._readers = np.full(words.size, -1)

  def _places(self, offset, constant, count):
    first = offset + constant
    assert not (first % (4 * count)).any()
    self._check_banks(first, count)
    return first[:, None] // 4 + np.arange(count)

  def _check_banks(self, first, count):
    """No two lanes that are served at a time want other words of a bank."""
    lanes = 32 // count
    for group in first.reshape(-1, lanes):
      words = group[:, None] // 4 + np.arange(count)
      if count > 1:
        assert len(np.unique(words % 32)) == len(np.unique(words))

  def load(self, offset, constant, count):
    places = self._places(offset, constant, count)
    self._readers[places] = self._thread[:, None]
    return [self.words[places[:, i]] for i in range(count)]

  def store(self, offset, constant, words):
    places = self._places(offset, constant, len(words))
    readers = self._readers[places]
    assert ((readers == -1) | (readers == self._thread[:, None])).all()
    assert len(np.unique(places)) == places.size
    self.words[places] = np.stack(words, axis=1)

  def synchronize(self):
    self._readers[:] = -1

  def permute(self, word, selector):
    sources = np.append(
      word.view(np.uint8).reshape(-1, 4),
      np.zeros((word.size, 4), np.uint8),
      axis=1,
    )
    chosen = [selector >> 4 * i & 7 for i in range(4)]
    return np.ascontiguousarray(sources[:, chosen]).view(np.uint32)[:, 0]

  def product(self, x, y):
    x, y = (
      np.broadcast_to(np.asarray(z, np.uint32), x.shape)
      .copy()
      .view(ml_dtypes.bfloat16)
      .astype(np.float32)
      for z in (x, y)
    )
    with np.errstate(invalid="ignore"):
      return (x * y).astype(ml_dtypes.bfloat16).view(np.uint32)


def chunk(row, tile, number, tiles_a_row):
  """Place of a 16-byte chunk of a row of a tile, as `copies` documents it."""
  permuted = number ^ row % 8
  return (((row // 8 * tiles_a_row + tile) * 8 + row % 8) * 8 + permuted) * 16


class WideningTest(parameterized.TestCase):
  @parameterized.parameters(
    # Tiles a row, of which to fill, the first scale's number, all scales'.
    (9, (0, 4), 0, 4),
    (9, (4, 8), 2, 4),
    (5, (0, 2), 0, 2),
    (5, (2, 4), 1, 2),
  )
  def test_gives_the_dequantized_rows(self, tiles_a_row, tiles, scale, blocks):
    rng = np.random.default_rng(0)
    first, last = tiles
    columns = 64 * (last - first)
    latent = rng.normal(size=(64, columns)) * 10.0 ** rng.integers(
      -30, 5, size=(64, columns)
    )
    latent[:, ::7] = -0.0
    latent[3] = 0
    latent[5, 1] = np.nan
    latent[6] = 57344
    latent[7] = 1e-36
    latents = pallas_kernels.quantize_latents(
      jnp.asarray(latent, jnp.float32), columns
    )
    expected = pallas_kernels.dequantize_latents(latents)
    scales = np.asarray(latents.scales)
    scales = np.pad(
      scales,
      ((0, 0), (scale, blocks - scale - scales.shape[1])),
      constant_values=np.nan,
    )
    memory = rng.integers(0, 256, 64 * tiles_a_row * 128, np.uint8)
    untouched = memory.copy()
    values = np.asarray(latents.values).view(np.uint8)
    for row in range(64):
      for number in range(values.shape[1] // 16):
        tile = first + number // 8
        place = chunk(row, tile, number % 8, tiles_a_row)
        memory[place : place + 16] = values[row, 16 * number : 16 * number + 16]
      place = chunk(row, (first + last) // 2, 0, tiles_a_row)
      memory[place : place + 2 * blocks] = scales[row].view(np.uint8)
    thread = np.arange(128, dtype=np.uint32)
    float8_rows.widen_rows(
      _Memory(memory.view(np.uint32), thread),
      thread,
      (8, tiles_a_row),
      tiles,
      scale,
    )
    actual = np.empty((64, columns), ml_dtypes.bfloat16)
    for row in range(64):
      for number in range(columns // 8):
        place = chunk(row, first + number // 8, number % 8, tiles_a_row)
        actual[row, 8 * number : 8 * number + 8] = memory[
          place : place + 16
        ].view(ml_dtypes.bfloat16)
        untouched[place : place + 16] = memory[place : place + 16]
    expected = np.asarray(expected)
    is_nan = np.isnan(np.asarray(expected, np.float32))
    np.testing.assert_array_equal(np.isnan(actual.astype(np.float32)), is_nan)
    # Bits: -0.0, too.
    np.testing.assert_array_equal(
      np.where(is_nan, 0, actual.view(np.uint16)),
      np.where(is_nan, 0, expected.view(np.uint16)),
    )
    np.testing.assert_array_equal(memory, untouched)

  def test_every_number(self):
    """Of float8, NaN aside; with the least and the greatest scale."""
    byte = np.arange(256, dtype=np.uint32)
    values = byte.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    is_number = ~np.isnan(values.astype(np.float32))
    memory = _Memory(np.zeros(0, np.uint32), np.zeros(0))
    for exponent in (-110, 0, 7):
      shifted = float8_rows._shifted(byte | byte << 16)
      factor = np.asarray([2.0 ** (120 + exponent)] * 2, ml_dtypes.bfloat16)
      actual = memory.product(shifted, factor.view(np.uint32))
      expected = values.astype(np.float32) * np.float32(2.0**exponent)
      for half in actual.view(np.uint16).reshape(-1, 2).T:
        np.testing.assert_array_equal(
          half[is_number],
          expected.astype(ml_dtypes.bfloat16).view(np.uint16)[is_number],
        )


def inputs(shape, seed=0):
  """Queries, quantized latents and indices; lengths from 0 to k, with holes."""
  rng = np.random.default_rng(seed)
  leading = (shape.batch, shape.num_queries)
  query, latent = (
    jax.random.normal(key, size, jnp.float32)
    for key, size in zip(
      jax.random.split(jax.random.key(seed)),
      (
        (*leading, shape.heads, shape.latent_dim),
        (shape.batch, shape.num_keys, shape.latent_dim),
      ),
      strict=True,
    )
  )
  places = rng.random((*leading, max(shape.num_keys, shape.k)), np.float32)
  indices = np.argsort(places, axis=-1)[..., : shape.k]
  length = rng.integers(0, shape.k + 1, size=(*leading, 1))
  length[:, ::3] = shape.k
  length[:, 5:6] = 0
  # The first row of each cache is NaN, and nobody selects it.
  is_selected = (
    (np.arange(shape.k) < length)
    & (rng.random(indices.shape) > 0.1)
    & (indices > 0)
    & (indices < shape.num_keys)
  )
  return (
    query.astype(jnp.bfloat16),
    pallas_kernels.quantize_latents(
      latent.at[:, 0].set(jnp.nan), shape.value_dim
    ),
    jnp.asarray(np.where(is_selected, indices, -1), jnp.int32),
  )


def call(*args, value_dim, **kwargs):
  return pallas_kernels.sparse_mla(
    *args, scale=0.05, value_dim=value_dim, **kwargs
  )


class EntryTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    sparse_attention_mosaic_gpu_test.setup(self)
    for module in (mosaic_gpu.forward, mosaic_gpu.few_heads, mosaic_gpu.probs):
      self.enter_context(mock.patch.object(module, "call", _plain(module.call)))

  @parameterized.parameters(
    # Head tiles, splits and paddings of every kind; both widths of values.
    shapes.Shape(1, 1, 700, 70, 290, 256, 600),
    shapes.Shape(2, 3, 300, 5, 576, 512, 260),
  )
  def test_pads_and_splits(self, *shape):
    shape = shapes.Shape(*shape)
    query, latents, indices = inputs(shape)
    out, residuals = jax.jit(
      functools.partial(
        call,
        value_dim=shape.value_dim,
        return_residuals=True,
        implementation="mosaic_gpu",
      )
    )(query, latents, indices)
    expected = loops.sparse_mla(
      query,
      pallas_kernels.dequantize_latents(latents),
      indices,
      0.05,
      shape.value_dim,
    )
    sparse_attention_test.assert_results_close(
      (out, residuals),
      expected,
      tolerances.tolerance("bfloat16"),
      shape.latent_dim,
    )

  def test_gradient_is_that_of_xla(self):
    shape = shapes.Shape(1, 5, 40, 12, 290, 256, 30)
    query, latents, indices = inputs(shape)

    def loss(implementation, query):
      out, residuals = call(
        query,
        latents,
        indices,
        value_dim=256,
        return_residuals=True,
        implementation=implementation,
      )
      log_sum_exp = residuals.log_sum_exp
      return (
        jnp.sum(jnp.sin(out.astype(jnp.float32)))
        + jnp.sum(jnp.where(log_sum_exp > -jnp.inf, log_sum_exp, 0))
        + jnp.sum(jnp.cos(3 * residuals.mean_probs))
      )

    actual, expected = (
      jax.jit(jax.grad(functools.partial(loss, implementation)))(query)
      for implementation in ("mosaic_gpu", "xla")
    )
    np.testing.assert_allclose(
      np.asarray(actual, np.float32),
      np.asarray(expected, np.float32),
      **tolerances.tolerance("bfloat16", 4, grads=True),
    )
    with self.assertRaisesRegex(ValueError, "in `query` alone"):
      jax.grad(
        lambda latents: jnp.sum(
          call(
            query,
            latents,
            indices,
            value_dim=256,
            implementation="mosaic_gpu",
          ).astype(jnp.float32)
        ),
        allow_int=True,
      )(latents)

  @parameterized.parameters(
    (96, 64, "multiple of 256 values.*got 64 and 32"),
    (256, 256, "of other columns: got 256 and 0"),
    (768, 512, "576 columns: got 768"),
  )
  def test_says_what_it_cannot_run(self, width, value_dim, message):
    args = inputs(shapes.Shape(1, 2, 40, 4, width, value_dim, 8))
    with self.assertRaisesRegex(NotImplementedError, message):
      call(*args, value_dim=value_dim, implementation="mosaic_gpu")
    # What the platform's order then comes to.
    out = call(*args, value_dim=value_dim)
    self.assertEqual(out.shape, (1, 2, 4, value_dim))

  def test_says_that_it_is_of_one_float8(self):
    query, latents, indices = inputs(shapes.Shape(1, 2, 40, 4, 320, 256, 8))
    other = latents._replace(values=latents.values.astype(jnp.float8_e5m2))
    with (
      errors.unchecked(),
      self.assertRaisesRegex(
        NotImplementedError, "got bfloat16 and float8_e5m2"
      ),
    ):
      call(query, other, indices, value_dim=256, implementation="mosaic_gpu")


def _plain(function):
  """The plain form of a kernel, of latents."""

  def run(problem, query, latents, *args):
    rows = pallas_kernels.dequantize_latents(latents)
    return function(problem, query, rows, *args)

  return run


if __name__ == "__main__":
  absltest.main()
