# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel, interpreted: numbers, races and seeded faults."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental import pallas as pl

import pallas_kernels
from pallas_kernels import chunking, tpu
from pallas_kernels.sparse_attention import (
  mosaic_tpu,
  mosaic_tpu_backward,
  mosaic_tpu_backward_kernel,
  mosaic_tpu_packed,
  reference,
  shapes,
)
from pallas_kernels.sparse_attention import mosaic_tpu_gather as gather
from pallas_kernels.sparse_attention import mosaic_tpu_layout as layout
from tests import tolerances
from tests.kernels import interpreters, loops, sparse_attention_test

# A tenth of a second where a chunk of 128 takes seconds to unroll and walk.
_TILES = mosaic_tpu.Tiles(chunk=8, buffers=3, ahead=2, cores=1)
_BACKWARD_TILES = mosaic_tpu.Tiles(chunk=8, buffers=2, ahead=1, cores=1)
# Three chunks a query, the last of them half full.
_SHAPE = shapes.Shape(1, 3, 40, 3, 24, 16, 20)


def setup(test, mode="on_wait"):
  test.enter_context(interpreters.mode(mode))
  test.enter_context(
    mock.patch.object(mosaic_tpu, "default_tiles", lambda *_: _TILES)
  )
  test.enter_context(
    mock.patch.object(
      mosaic_tpu_backward, "default_tiles", lambda *_: _BACKWARD_TILES
    )
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
    mode=tuple(interpreters.MODES), dtype=("float32", "bfloat16"), ahead=(1, 2)
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
    mode=tuple(interpreters.MODES), fault=("missing_wait", "neighbour_slot")
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


class BackwardTest(parameterized.TestCase):
  """Against the gradients that JAX derives of the definition."""

  def inputs(self, shape, dtype):
    """The arguments of the backward pass, and what it should return."""
    args = inputs(shape, dtype)
    (out, residuals), vjp = jax.vjp(
      lambda query, latent: reference.sparse_mla(
        query, latent, args[2], scale=0.3, value_dim=16
      ),
      *args[:2],
    )
    rng = np.random.default_rng(3)
    grad_out = jnp.asarray(rng.normal(size=out.shape), out.dtype)
    top = residuals.log_sum_exp
    grad_top = jnp.asarray(rng.normal(size=top.shape), jnp.float32)
    grad_residuals = reference.SparseMLAResiduals(
      jnp.where(top > -jnp.inf, grad_top, 0.0),
      jnp.zeros_like(residuals.mean_probs),
    )
    arguments = (*args, out, top, grad_out, grad_top)
    return arguments, vjp((grad_out, grad_residuals))

  def run_kernel(self, arguments, **tiles):
    return jax.jit(
      functools.partial(
        mosaic_tpu_backward.sparse_mla_backward,
        scale=0.3,
        tiles=_BACKWARD_TILES._replace(**tiles),
      ),
      compiler_options=interpreters.COMPILER_OPTIONS,
    )(*arguments)

  def assert_right(self, actual, expected):
    for a, b in zip(actual, expected, strict=True):
      self.assertEqual(a.dtype, b.dtype)
      np.testing.assert_allclose(
        np.float32(a),
        np.float32(b),
        **tolerances.tolerance(
          a.dtype, 4 if a.dtype == jnp.bfloat16 else 44, grads=True
        ),
      )

  @parameterized.product(
    mode=tuple(interpreters.MODES), dtype=("float32", "bfloat16")
  )
  def test_interpreted_in_three_ways(self, mode, dtype):
    # Its last query has no row.
    shape = _SHAPE._replace(num_queries=5)
    arguments, expected = self.inputs(shape, dtype)
    setup(self, mode)
    self.assert_right(self.run_kernel(arguments), expected)

  def test_two_cores_have_sums_of_their_own(self):
    arguments, expected = self.inputs(_SHAPE._replace(batch=2), "bfloat16")
    setup(self)
    self.assert_right(self.run_kernel(arguments, cores=2), expected)

  def test_queries_in_parts(self):
    arguments, expected = self.inputs(
      _SHAPE._replace(batch=2, num_queries=2), "float32"
    )
    setup(self)
    self.enter_context(mock.patch.object(chunking, "CHUNK_BYTES", 1))
    self.assert_right(self.run_kernel(arguments), expected)

  def test_a_gradient_of_the_probabilities_is_the_references(self):
    query, latent, indices = inputs(_SHAPE)
    setup(self)

    def loss(implementation, query, latent):
      out, residuals = pallas_kernels.sparse_mla(
        query,
        latent,
        indices,
        scale=0.3,
        value_dim=16,
        return_residuals=True,
        implementation=implementation,
      )
      return jnp.sum(out) + jnp.sum(jnp.sin(residuals.mean_probs))

    grads = [
      jax.grad(functools.partial(loss, name), (0, 1))(query, latent)
      for name in ("mosaic_tpu", "xla")
    ]
    self.assert_right(*grads)

  @parameterized.product(
    mode=("on_wait", "races"), fault=("load_wait", "store_wait", "wrong_row")
  )
  def test_a_seeded_fault_is_caught(self, mode, fault):
    """No wait for the sums' loads, or stores; all in the first one's place."""
    sums = mosaic_tpu_backward_kernel.Sums
    wait, start_all = sums._wait, sums._start_all

    def to_first_place(self, copy):
      start_all(
        self,
        lambda hbm, vmem: copy(hbm, self.buffer.at[pl.ds(0, hbm.shape[0])]),
      )

    seeded = {
      "load_wait": ("_wait", lambda self, n: wait(self, n) if n else None),
      "store_wait": ("wait_stores", lambda self: None),
      "wrong_row": ("_start_all", to_first_place),
    }[fault]
    arguments, expected = self.inputs(_SHAPE, "float32")
    setup(self, mode)
    self.enter_context(mock.patch.object(sums, *seeded))
    # Copies by one thread to one place are no race, only wrong.
    if mode == "races" and fault != "wrong_row":
      with self.assertRaisesRegex(jax.errors.JaxRuntimeError, "RACE"):
        self.run_kernel(arguments)
    else:
      actual = self.run_kernel(arguments)
      with self.assertRaisesRegex(AssertionError, "Not equal to tolerance"):
        self.assert_right(actual, expected)


class PackedTest(parameterized.TestCase):
  def attend(self, implementation, packed=None):
    query, latent, indices = inputs(_SHAPE, "bfloat16")
    return mosaic_tpu_packed.sparse_mla_packed(
      query,
      packed or layout.pack(latent),
      indices,
      scale=0.3,
      value_dim=16,
      return_residuals=True,
      implementation=implementation,
    )

  def test_both_implementations_are_those_of_plain_rows(self):
    expected = loops.sparse_mla(*inputs(_SHAPE, "bfloat16"), 0.3, 16)
    bound = tolerances.tolerance("bfloat16", 4)
    out, _ = self.attend(None)
    np.testing.assert_allclose(np.float32(out), expected[0], **bound)
    setup(self)
    out, residuals = self.attend("mosaic_tpu")
    np.testing.assert_allclose(np.float32(out), expected[0], **bound)
    self.assertEqual(residuals.mean_probs.shape, (1, 3, 20))

  def test_a_cache_of_another_width_or_dtype(self):
    for width, dtype in ((25, jnp.bfloat16), (24, jnp.float32)):
      with self.assertRaisesRegex(ValueError, f"width {width}, {dtype.dtype}"):
        self.attend("xla", layout.empty(1, 40, width, jnp.dtype(dtype)))

  def test_packs_where_the_kernel_will_run(self):
    is_preferred = mosaic_tpu_packed.is_preferred
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
    self.assertEqual(
      layout.padding_bytes(width, dtype),
      512 * tiles - width * jnp.dtype(dtype).itemsize,
    )
    np.testing.assert_array_equal(
      packed.words[:, 2 * tiles : 4 * tiles], layout.pack_rows(latent[:, 2:4])
    )
    np.testing.assert_array_equal(packed.words[:, 5 * tiles :], 0)

  @parameterized.parameters("float32", "bfloat16")
  def test_write_puts_tokens_at_their_places(self, dtype):
    rng = np.random.default_rng(0)
    latent = jnp.asarray(rng.normal(size=(2, 5, 300)), dtype)
    positions = jnp.asarray([[0, 3], [4, 5]])
    packed = layout.write(
      layout.empty(2, 5, 300, latent.dtype), latent[:, :2], positions
    )
    expected = np.zeros(latent.shape, np.float32)
    expected[0, [0, 3]] = latent[0, :2]
    expected[1, 4] = latent[1, 0]  # Place 5 is beyond the last.
    np.testing.assert_array_equal(np.float32(layout.unpack(packed)), expected)
    tiles = layout.row_tiles(300, dtype)
    np.testing.assert_array_equal(packed.words[:, 5 * tiles :], 0)

  def test_tiles_by_chip(self):
    one, two = (tpu.Chip("", 64 << 20, cores, False) for cores in (1, 2))
    self.assertEqual(mosaic_tpu.default_tiles(4096, 2048, two).cores, 2)
    self.assertEqual(mosaic_tpu.default_tiles(1, 2048, two).cores, 1)
    self.assertEqual(mosaic_tpu.default_tiles(8, 2048, one).chunk, 512)
    self.assertEqual(mosaic_tpu.default_tiles(8, 9, one).chunk, 128)


if __name__ == "__main__":
  absltest.main()
