# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel, interpreted: numbers, races and seeded faults."""

import faulthandler
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.sparse_attention import mosaic_tpu, shapes
from pallas_kernels.sparse_attention import mosaic_tpu_gather as gather
from pallas_kernels.sparse_attention import mosaic_tpu_layout as layout
from tests import tolerances
from tests.kernels import interpreters, loops, sparse_attention_test

# A tenth of a second where a chunk of 128 takes seconds to unroll and walk.
_TILES = mosaic_tpu.Tiles(chunk=8, buffers=3, ahead=2, cores=1)
# Three chunks a query, the last of them half full.
_SHAPE = shapes.Shape(1, 3, 40, 3, 24, 16, 20)
_MODES = {
  **interpreters.MODES,
  # Eager, for a copy that is never waited for is else never made: no race.
  "races": pltpu.InterpretParams(dma_execution_mode="eager", detect_races=True),
}
# A semaphore that nobody signals hangs the interpreter.
_TIMEOUT_S = 240


def setup(test, mode="on_wait"):
  faulthandler.dump_traceback_later(_TIMEOUT_S, exit=True)
  test.addCleanup(faulthandler.cancel_dump_traceback_later)
  test.addCleanup(pltpu.reset_tpu_interpret_mode_state)
  test.enter_context(interpreters.chip())
  test.enter_context(pltpu.force_tpu_interpret_mode(_MODES[mode]))
  test.enter_context(
    mock.patch.object(mosaic_tpu, "default_tiles", lambda *_: _TILES)
  )


def inputs(shape, dtype=jnp.float32):
  """Random arrays; query t has `k - 5 t` rows, at random places of the K."""
  query, latent, _ = sparse_attention_test.inputs(shape, dtype)
  rng = np.random.default_rng(1)
  indices = np.full((shape.batch, shape.num_queries, shape.k), -1, np.int32)
  for b, t in np.ndindex(indices.shape[:2]):
    count = max(shape.k - 5 * t, 0)
    places = rng.permutation(shape.k)[:count]
    indices[b, t, places] = rng.permutation(shape.num_keys)[:count]
  return query, latent, jnp.asarray(indices)


def attend(args, tiles=None):
  query, latent, indices = args
  packed = layout.pack(latent)
  return jax.jit(
    lambda *args: mosaic_tpu.sparse_mla_packed(
      *args, scale=0.3, value_dim=16, tiles=tiles
    ),
    compiler_options=interpreters.COMPILER_OPTIONS,
  )(query, packed, indices)


class SharedTest(sparse_attention_test.SparseMLATest):
  IMPLEMENTATION = "mosaic_tpu"

  def setUp(self):
    super().setUp()
    setup(self)


class KernelTest(parameterized.TestCase):
  def assert_right(self, args, actual):
    dtype = args[0].dtype
    out, residuals = actual
    expected = loops.sparse_mla(*args, 0.3, 16)
    np.testing.assert_allclose(
      np.asarray(out, np.float32),
      expected[0],
      **tolerances.tolerance(dtype, 4 if dtype == jnp.bfloat16 else 44),
    )
    for actual, want in zip(residuals, expected[1:], strict=True):
      np.testing.assert_allclose(
        actual, want, **tolerances.tolerance("float32", 44)
      )

  @parameterized.product(
    mode=tuple(_MODES), dtype=("float32", "bfloat16"), ahead=(1, 2)
  )
  def test_interpreted_in_three_ways(self, mode, dtype, ahead):
    setup(self, mode)
    args = inputs(_SHAPE, dtype)
    self.assert_right(args, attend(args, _TILES._replace(ahead=ahead)))

  @parameterized.parameters(1, 4, 5)
  def test_any_number_of_steps(self, num_queries):
    setup(self)
    args = inputs(shapes.Shape(1, num_queries, 40, 3, 24, 16, 8), "bfloat16")
    self.assert_right(args, attend(args, _TILES._replace(buffers=4, ahead=3)))

  @parameterized.parameters(20, 128)
  def test_heads_of_real_models_and_whole_tiles(self, heads):
    setup(self)
    args = inputs(shapes.Shape(1, 2, 300, heads, 24, 16, 140), "bfloat16")
    tiles = mosaic_tpu.Tiles(chunk=128, buffers=2, ahead=1, cores=1)
    self.assert_right(args, attend(args, tiles))

  def test_two_cores_share_the_queries(self):
    setup(self)
    args = inputs(_SHAPE, "bfloat16")
    self.assert_right(args, attend(args, _TILES._replace(cores=2)))

  def test_an_index_past_the_end_reads_the_last_row(self):
    setup(self)
    args = inputs(_SHAPE)
    past = args[2].at[0, 2, 0].set(1 << 30)
    last = args[2].at[0, 2, 0].set(_SHAPE.num_keys - 1)
    jax.tree.map(
      np.testing.assert_array_equal,
      attend((*args[:2], past)),
      attend((*args[:2], last)),
    )

  @parameterized.product(
    mode=tuple(_MODES), fault=("missing_wait", "neighbour_slot")
  )
  def test_a_seeded_fault_is_caught(self, mode, fault):
    setup(self, mode)
    start_row = gather.Loads._start_row

    def start_in_next_slot(self, slot, *args):
      rotated = [*self.buffers[1:], self.buffers[0]]
      start_row(self._replace(buffers=rotated), slot, *args)

    seeded = {
      "missing_wait": ("wait_rows", lambda *_: None),
      "neighbour_slot": ("_start_row", start_in_next_slot),
    }[fault]
    args = inputs(_SHAPE)
    with mock.patch.object(gather.Loads, *seeded):
      if mode == "races":
        with self.assertRaisesRegex(jax.errors.JaxRuntimeError, "RACE"):
          attend(args)
      elif mode == "eager" and fault == "missing_wait":
        # Instant copies hide it; that is why there are three ways.
        self.assert_right(args, attend(args))
      else:
        actual = attend(args)
        with self.assertRaisesRegex(AssertionError, "Not equal to tolerance"):
          self.assert_right(args, actual)

  def test_what_it_refuses(self):
    setup(self)
    query, latent, indices = inputs(_SHAPE)
    with self.assertRaisesRegex(NotImplementedError, "float32 and bfloat16"):
      attend((query, latent.astype(jnp.bfloat16), indices))
    with self.assertRaisesRegex(NotImplementedError, "float16"):
      attend((query.astype(jnp.float16), latent, indices))
    wide = jnp.zeros((1, 3, 129, 24))
    with self.assertRaisesRegex(NotImplementedError, "128 heads: got 129"):
      attend((wide, latent, indices))
    many = jnp.zeros((1, 3, 1 << 20), jnp.int32)
    with self.assertRaisesRegex(NotImplementedError, "3 heads x 1048576 rows"):
      attend((query, latent, many))


class LayoutTest(parameterized.TestCase):
  @parameterized.product(
    width=(24, 128, 300, 576), dtype=("float32", "bfloat16")
  )
  def test_unpack_inverts_pack(self, width, dtype):
    rng = np.random.default_rng(0)
    latent = jnp.asarray(rng.normal(size=(2, 5, width)), dtype)
    packed = layout.pack(latent)
    np.testing.assert_array_equal(layout.unpack(packed), latent)
    self.assertEqual(packed.words.shape[1] % 8, 0)
    tiles = layout.row_tiles(width, dtype)
    np.testing.assert_array_equal(
      packed.words[:, 2 * tiles : 4 * tiles], layout.pack_rows(latent[:, 2:4])
    )
    np.testing.assert_array_equal(packed.words[:, 5 * tiles :], 0)

  def test_tiles_by_chip(self):
    one, two = (tpu.Chip("", 64 << 20, cores, False) for cores in (1, 2))
    self.assertEqual(mosaic_tpu.default_tiles(4096, 2048, two).cores, 2)
    self.assertEqual(mosaic_tpu.default_tiles(1, 2048, two).cores, 1)
    self.assertEqual(mosaic_tpu.default_tiles(8, 2048, one).chunk, 512)
    self.assertEqual(mosaic_tpu.default_tiles(8, 9, one).chunk, 128)


if __name__ == "__main__":
  absltest.main()
