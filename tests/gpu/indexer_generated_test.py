# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The indexer on the GPU: queries with bounds of their own, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from tests.gpu import device, float64, generated
from tests.kernels import gradient_loops

_BF16, _FP8 = jnp.bfloat16, jnp.float8_e4m3fn
# Dtype, (batch, queries, keys, heads, dim), k, whether keys have scales.
_CALLS = (
  (_BF16, (2, 128, 2077, 64, 128), 512, False),
  (_FP8, (2, 128, 2048, 32, 128), 2048, True),
  (_BF16, (1, 200, 3001, 20, 64), 300, True),
  (_FP8, (1, 65, 5000, 8, 100), 999, False),
  (_BF16, (3, 100, 384, 1, 16), 7, False),
  # Few enough rows for the kernel that decodes.
  (_FP8, (2, 31, 1000, 1, 64), 100, True),
  (_BF16, (4, 1, 8192, 64, 128), 2048, False),
  (_FP8, (8, 2, 5001, 32, 128), 512, True),
  (_BF16, (2, 5, 60, 20, 64), 100, True),
  # Long caches.
  (_BF16, (1, 16, 131072, 64, 128), 2048, False),
  (_FP8, (1, 1, 1048576, 32, 128), 2048, True),
  (_BF16, (1, 1, 1048576, 32, 128), 2048, False),
)
# Of a score, relative to its terms without their signs, and of all scores in
# the Frobenius norm: the matrix units sum 8-bit products to some 14 bits. An
# H200 has 2e-7 and 1.4e-4 of the latter.
_ROUNDING = {"bfloat16": (3e-7, 2e-6), "float8_e4m3fn": (3e-4, 1e-3)}


def setUpModule():
  device.require_hopper()


def normal(rng, *shape):
  return rng.standard_normal(shape, np.float32)


def whole(rng, *shape):
  """Small whole numbers: every sum is exact in any order, and many tie."""
  return rng.integers(-2, 3, shape).astype(np.float32)


def opposed(rng, *shape):
  """Queries of one sign, keys of the other: every score is 0 or -0."""
  sign = 1 if len(shape) == 4 else -1
  return sign * np.abs(whole(rng, *shape))


_KINDS = {"normal": normal, "whole": whole, "opposed": opposed}


class IndexerGeneratedTest(parameterized.TestCase):
  IMPLEMENTATION = "mosaic_gpu"

  @parameterized.parameters(*_CALLS)
  def test_queries(self, dtype, shape, k, scaled):
    batch, queries, num_keys, heads, dim = shape
    rng = np.random.default_rng(num_keys + heads)
    for kind, draw in _KINDS.items():
      q = jnp.asarray(draw(rng, batch, queries, heads, dim), dtype)
      keys = jnp.asarray(draw(rng, batch, num_keys, dim), dtype)
      w = jnp.asarray(draw(rng, batch, queries, heads))
      start, end = generated.bounds(rng, batch, queries, num_keys)
      scale = jnp.asarray(2.0 ** rng.integers(-1, 2, (batch, num_keys)), "f4")
      if not scaled:
        scale = jnp.ones_like(scale)
      arguments = (q, poison(keys, start, end), w, start, end)
      with self.subTest(kind=kind):
        self.check(
          arguments,
          {"key_scale": scale} if scaled else {},
          float64.indexer_scores(q, keys, w, start, end, scale),
          k,
          is_exact=kind != "normal",
        )

  def test_thousands_of_queries(self):
    """As many as a prefill has; 16 of them are compared."""
    rng = np.random.default_rng(0)
    for dtype, heads in ((_BF16, 64), (_FP8, 32)):
      q = generated.normal(rng, 1, 2048, heads, 128, dtype=dtype)
      keys = generated.normal(rng, 1, 16384, 128, dtype=dtype)
      w = generated.normal(rng, 1, 2048, heads, dtype=jnp.float32)
      start, end = generated.bounds(rng, 1, 2048, 16384)
      arguments = (q, keys, w, start, end)
      places = rng.permutation(2048)[:16]
      few = [x[:, places] for x in (q, w, start, end)]
      expected = float64.indexer_scores(
        few[0], keys, *few[1:], jnp.ones((1, 16384))
      )
      with self.subTest(dtype=dtype.__name__):
        self.check(arguments, {}, expected, 2048, places=places)

  def check(
    self, arguments, scale, expected, k, *, is_exact=False, places=None
  ):
    """Scores against float64, and the selection against the scores."""
    places = slice(None) if places is None else places
    run = generated.jitted("indexer_scores", self.IMPLEMENTATION)
    scores = np.asarray(run(*arguments, **scale)[:, places])
    self.check_scores(scores, *expected, arguments[0].dtype.name, is_exact)
    run = generated.jitted("indexer_topk", self.IMPLEMENTATION, k=k)
    selected = np.asarray(run(*arguments, **scale)[:, places])
    wrong = generated.wrong_selections(
      scores.reshape(-1, scores.shape[-1]), None, k, selected.reshape(-1, k)
    )
    self.assertEmpty(wrong)
    device.count_cases(selected.shape[0] * selected.shape[1])

  def check_scores(self, scores, expected, sizes, dtype, is_exact):
    visible = expected > -np.inf
    np.testing.assert_array_equal(scores > -np.inf, visible)
    if is_exact:
      np.testing.assert_array_equal(scores, expected.astype(np.float32))
      return
    error = np.abs(scores[visible] - expected[visible])
    of_terms, of_all = _ROUNDING[dtype]
    self.assertLess(np.max(error / sizes[visible], initial=0), of_terms)
    norm = np.linalg.norm(expected[visible])
    self.assertLess(np.linalg.norm(error), of_all * norm)

  @parameterized.parameters(
    (2, 60, 300, 16, 64), (1, 100, 500, 32, 128), (3, 1, 700, 8, 128)
  )
  def test_gradients(self, batch, queries, num_keys, heads, dim):
    rng = np.random.default_rng(num_keys)
    q, keys, w = (
      generated.normal(rng, *shape, dtype=dtype)
      for *shape, dtype in (
        (batch, queries, heads, dim, _BF16),
        (batch, num_keys, dim, _BF16),
        (batch, queries, heads, jnp.float32),
      )
    )
    start, end = generated.bounds(rng, batch, queries, num_keys)
    place = jnp.arange(num_keys)
    visible = (place >= start[..., None]) & (place < end[..., None])
    grad = generated.normal(rng, *visible.shape, dtype=jnp.float32)
    run = generated.jitted("indexer_scores", self.IMPLEMENTATION)

    @jax.jit
    def gradients(q, keys, w, grad):
      _, vjp = jax.vjp(lambda *args: run(*args, start, end), q, keys, w)
      return vjp(grad)

    actual = gradients(q, poison(keys, start, end), w, grad)
    indices = jnp.where(visible, place, -1)
    _, expected = float64.selected_scores(
      q, keys, w, indices, jnp.where(visible, grad, 0)
    )
    for a, b in zip(actual, expected, strict=True):
      self.assertLess(gradient_loops.relative_error(a, b), 1e-2)
    device.count_cases(batch * queries)


def poison(keys, start, end):
  """Keys with NaN where no query of their sequence sees them."""
  place = jnp.arange(keys.shape[1])[:, None]
  visible = (place >= start[:, None]) & (place < end[:, None])
  return jnp.where(jnp.any(visible, axis=-1)[..., None], keys, jnp.nan).astype(
    keys.dtype
  )


if __name__ == "__main__":
  device.main()
