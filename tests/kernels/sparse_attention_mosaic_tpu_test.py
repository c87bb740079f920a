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
  mosaic_tpu_merge,
  packing,
  reference,
  shapes,
)
from pallas_kernels.sparse_attention import mosaic_tpu_gather as gather
from tests import tolerances
from tests.kernels import interpreters, loops, sparse_attention_test

# A tenth of a second where a chunk of 128 takes seconds to unroll and walk.
_TILES = mosaic_tpu.Tiles(chunk=8, buffers=4, ahead=3, cores=1)
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


def attend(args, tiles=None, with_mean_probs=True):
  query, latent, indices = args
  packed = packing.pack(latent)
  return jax.jit(
    lambda *args: mosaic_tpu.sparse_mla_packed(
      *args,
      scale=0.3,
      value_dim=16,
      tiles=tiles,
      with_mean_probs=with_mean_probs,
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
      if actual is not None:
        np.testing.assert_allclose(
          actual, want, **tolerances.tolerance("float32", 44)
        )

  @parameterized.product(
    mode=tuple(interpreters.MODES),
    dtype=("float32", "bfloat16"),
    ahead=(1, 2, 3),
  )
  def test_interpreted_in_three_ways(self, mode, dtype, ahead):
    setup(self, mode)
    args = inputs(_SHAPE, dtype)
    self.assert_right(args, attend(args, _TILES._replace(ahead=ahead)))

  @parameterized.parameters(1, 4, 5)
  def test_any_number_of_steps(self, num_queries):
    setup(self)
    args = inputs(shapes.Shape(1, num_queries, 40, 3, 24, 16, 8), "bfloat16")
    self.assert_right(args, attend(args, _TILES._replace(buffers=2, ahead=1)))

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

  def test_without_mean_probabilities_the_rest_is_the_same(self):
    setup(self)
    args = inputs(_SHAPE, "bfloat16")
    out, residuals = attend(args)
    alone, log_sum_exp_alone = attend(args, with_mean_probs=False)
    self.assertIsNone(log_sum_exp_alone.mean_probs)
    np.testing.assert_array_equal(alone, out)
    np.testing.assert_array_equal(
      log_sum_exp_alone.log_sum_exp, residuals.log_sum_exp
    )

  @parameterized.product(
    mode=tuple(interpreters.MODES), dtype=("float32", "bfloat16")
  )
  def test_parts_of_a_querys_rows(self, mode, dtype):
    """Of 20, 15, 10, 5 and 0 rows among 20 places, in parts of 16."""
    setup(self, mode)
    args = inputs(_SHAPE._replace(num_queries=5), dtype)
    # All rows of one query in the first part, of another in the second.
    indices = np.array(args[2])
    indices[0, 1:3] = -1
    indices[0, 1, :16], indices[0, 2, 16:] = np.arange(16), np.arange(4)
    args = (*args[:2], jnp.asarray(indices))
    tiles = _TILES._replace(cores=2, parts=2)
    self.assert_right(args, attend(args, tiles, with_mean_probs=False))

  def test_parts_are_the_same_in_every_run(self):
    setup(self)
    args = inputs(_SHAPE._replace(num_queries=1), "bfloat16")
    tiles = _TILES._replace(cores=2, parts=2)
    runs = [attend(args, tiles, with_mean_probs=False) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *runs)

  def test_a_merge_that_forgets_the_weights_is_caught(self):
    setup(self)
    args = inputs(_SHAPE, "float32")
    call = mosaic_tpu_merge.call

    def unweighted(out, log_sum_exp, parts, dtype):
      return call(out, jnp.zeros_like(log_sum_exp), parts, dtype)

    tiles = _TILES._replace(cores=2, parts=2)
    with mock.patch.object(mosaic_tpu_merge, "call", unweighted):
      actual = attend(args, tiles, with_mean_probs=False)
    with self.assertRaisesRegex(AssertionError, "Not equal to tolerance"):
      self.assert_right(args, actual)

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
    with self.assertRaisesRegex(ValueError, "power of two: got buffers=3"):
      attend((query, latent, indices), _TILES._replace(buffers=3))

  def test_tiles_by_chip(self):
    one, two = (tpu.Chip("", 64 << 20, cores, False) for cores in (1, 2))
    tiles = mosaic_tpu.default_tiles
    self.assertEqual(tiles(4096, 2048, two).cores, 2)
    self.assertEqual(tiles(8, 2048, one).chunk, 512)
    self.assertEqual(tiles(8, 9, one).chunk, 128)
    # A lone query's rows are shared, but for mean probabilities.
    self.assertEqual(tiles(1, 2048, two)[-2:], (2, 2))
    self.assertEqual(tiles(1, 2048, two, with_mean_probs=True)[-2:], (1, 1))
    self.assertEqual(tiles(1, 2048, one)[-2:], (1, 1))


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
    start_all = sums._start_all

    def to_first_place(self, slot, copy):
      buffer = self.buffers[slot]
      start_all(
        self,
        slot,
        lambda hbm, vmem: copy(hbm, buffer.at[pl.ds(0, hbm.shape[0])]),
      )

    seeded = {
      "load_wait": ("wait_loads", lambda *_: None),
      "store_wait": ("wait_stores", lambda *_: None),
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
  @parameterized.parameters(False, True)
  def test_numbers_are_those_of_plain_rows(self, return_residuals):
    query, latent, indices = inputs(_SHAPE, "bfloat16")
    setup(self)
    result = pallas_kernels.sparse_mla_packed(
      query,
      packing.pack(latent),
      indices,
      scale=0.3,
      value_dim=16,
      return_residuals=return_residuals,
      implementation="mosaic_tpu",
    )
    expected = loops.sparse_mla(query, latent, indices, 0.3, 16)
    out = result[0] if return_residuals else result
    np.testing.assert_allclose(
      np.float32(out), expected[0], **tolerances.tolerance("bfloat16", 4)
    )
    if return_residuals:
      for actual, want in zip(result[1], expected[1:], strict=True):
        np.testing.assert_allclose(
          actual, want, **tolerances.tolerance("float32", 44)
        )


if __name__ == "__main__":
  absltest.main()
