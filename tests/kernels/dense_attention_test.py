# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.dense_attention import shapes
from tests import tolerances
from tests.kernels import errors

_SCALE = 0.3


def inputs(shape, dtype=jnp.float32, seed=0, offset=None):
  """Random arguments; query t sees keys up to t + offset."""
  batch, queries, keys, heads, width = shape
  rng = np.random.default_rng(seed)
  offset = keys - queries if offset is None else offset
  end = np.clip(np.arange(queries) + 1 + offset, 0, keys)
  return (
    jnp.asarray(rng.normal(size=(batch, queries, heads, width)), dtype),
    jnp.asarray(rng.normal(size=(batch, keys, width)), dtype),
    jnp.zeros((batch, queries), jnp.int32),
    jnp.broadcast_to(jnp.asarray(end, jnp.int32), (batch, queries)),
  )


def loop(query, kv_latent, key_start, key_end, scale):
  """The definition in float64, query by query."""
  query, kv_latent = (np.asarray(x, np.float64) for x in (query, kv_latent))
  batch, queries, heads = query.shape[:3]
  log_sum_exp = np.full((batch, queries, heads), -np.inf)
  mean_probs = np.zeros((batch, queries, kv_latent.shape[1]))
  for b, t in np.ndindex(batch, queries):
    seen = slice(int(key_start[b, t]), int(key_end[b, t]))
    if seen.start >= seen.stop:
      continue
    logits = scale * query[b, t] @ kv_latent[b, seen].T
    log_sum_exp[b, t] = np.logaddexp.reduce(logits, axis=-1)
    probs = np.exp(logits - log_sum_exp[b, t, :, None])
    mean_probs[b, t, seen] = probs.mean(axis=0)
  return log_sum_exp, mean_probs


class DenseAttentionTest(parameterized.TestCase):
  IMPLEMENTATION = "xla"
  DTYPE = jnp.float32
  SHAPES = (
    shapes.SHAPES["tiny"],
    shapes.Shape(1, 1, 77, 5, 8),
    shapes.Shape(1, 33, 33, 3, 16),
  )

  def inputs(self, shape, **kwargs):
    return inputs(shape, self.DTYPE, **kwargs)

  def run_op(self, *args, scale=_SCALE):
    return jax.jit(
      lambda *args: pallas_kernels.dense_mla_residuals(
        *args, scale=scale, implementation=self.IMPLEMENTATION
      )
    )(*args)

  def check(self, args, scale=_SCALE):
    expected = loop(*args, scale)
    tolerance = tolerances.tolerance("float32", args[0].shape[-1])
    for a, b in zip(self.run_op(*args, scale=scale), expected, strict=True):
      self.assertEqual(a.dtype, jnp.float32)
      np.testing.assert_allclose(a, b, **tolerance)

  def test_equals_a_float64_loop(self):
    for shape in self.SHAPES:
      with self.subTest(str(shape)):
        self.check(self.inputs(shape))

  @parameterized.parameters(1.7, 0.0, -0.4)
  def test_scale(self, scale):
    self.check(self.inputs(self.SHAPES[0]), scale)

  def test_segments_and_queries_without_keys(self):
    shape = self.SHAPES[0]
    query, keys, start, end = self.inputs(shape, offset=-4)
    half = shape.num_queries // 2
    start = start.at[:, half:].set(half - 4)
    args = (query, keys, start, end)
    self.check(args)
    log_sum_exp, probs = self.run_op(*args)
    np.testing.assert_array_equal(log_sum_exp[:, :4], -np.inf)
    np.testing.assert_array_equal(probs[:, :4], 0.0)

  def test_probabilities_sum_to_one(self):
    _, probs = self.run_op(*self.inputs(self.SHAPES[0]))
    np.testing.assert_allclose(jnp.sum(probs, axis=-1), 1.0, rtol=1e-5)

  def test_large_logits_do_not_overflow(self):
    query, keys, start, end = self.inputs(self.SHAPES[0])
    log_sum_exp, probs = self.run_op(query * 64, keys, start, end)
    self.assertTrue(np.all(np.isfinite(log_sum_exp)))
    np.testing.assert_allclose(jnp.sum(probs, axis=-1), 1.0, rtol=1e-4)

  def test_nan_in_unseen_keys_touches_nothing(self):
    query, keys, start, end = self.inputs(self.SHAPES[0], offset=2)
    dirty = keys.at[:, int(end.max()) :].set(jnp.nan)
    self.assertTrue(np.any(np.isnan(np.asarray(dirty, np.float32))))
    jax.tree.map(
      np.testing.assert_array_equal,
      self.run_op(query, keys, start, end),
      self.run_op(query, dirty, start, end),
    )

  def test_run_to_run_bit_equal(self):
    args = self.inputs(self.SHAPES[0])
    first = self.run_op(*args)
    for _ in range(3):
      jax.tree.map(np.testing.assert_array_equal, self.run_op(*args), first)

  def test_has_no_gradient(self):
    args = self.inputs(self.SHAPES[0])

    def loss(query, keys):
      log_sum_exp, probs = pallas_kernels.dense_mla_residuals(
        query, keys, *args[2:], scale=1.0, implementation=self.IMPLEMENTATION
      )
      own = jnp.sum(query.astype(jnp.float32)) + jnp.sum(
        keys.astype(jnp.float32)
      )
      return jnp.sum(log_sum_exp) + jnp.sum(probs) + own

    for grad in jax.grad(loss, (0, 1))(*args[:2]):
      np.testing.assert_array_equal(np.asarray(grad, np.float32), 1.0)

  def test_errors(self):
    query, keys, start, end = self.inputs(self.SHAPES[0])
    with errors.unchecked():
      with self.assertRaisesRegex(ValueError, "kv_latent.shape=.*, 23"):
        pallas_kernels.dense_mla_residuals(
          query, jnp.zeros((2, 40, 23)), start, end, scale=1.0
        )
      with self.assertRaisesRegex(ValueError, "one entry a query.*12"):
        pallas_kernels.dense_mla_residuals(
          query, keys, start, jnp.zeros((2, 12), jnp.int32), scale=1.0
        )


if __name__ == "__main__":
  absltest.main()
