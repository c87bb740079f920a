# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.indexer import quantization, shapes
from tests import tolerances
from tests.kernels import errors, loops


def inputs(shape, dtype=jnp.float32, seed=0, offset=None):
  """Random arguments; query t sees keys up to t + offset."""
  rng = np.random.default_rng(seed)
  batch, queries, keys, heads, dim = shape[:5]
  offset = keys - queries if offset is None else offset
  end = np.clip(np.arange(queries) + 1 + offset, 0, keys)
  return (
    jnp.asarray(rng.normal(size=(batch, queries, heads, dim)), dtype),
    jnp.asarray(rng.normal(size=(batch, keys, dim)), dtype),
    jnp.asarray(rng.normal(size=(batch, queries, heads)), jnp.float32),
    jnp.zeros((batch, queries), jnp.int32),
    jnp.broadcast_to(jnp.asarray(end, jnp.int32), (batch, queries)),
  )


class IndexerTest(parameterized.TestCase):
  IMPLEMENTATION = "xla"
  # Of `selected_indexer_scores`.
  SELECTED_IMPLEMENTATION = "xla"
  # Of queries and keys: products of bfloat16 are exact in float32.
  DTYPE = jnp.float32
  COMPILER_OPTIONS = None
  # A head dim whose keys are scored where they are. None: they are copied.
  UNCOPIED_DIM = None

  def inputs(self, shape, **kwargs):
    return inputs(shape, self.DTYPE, **kwargs)

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Of a class, whose tests all patch the same. A GPU kernel takes seconds to
    # compile.
    cls.jitted = staticmethod(functools.cache(cls.jit))

  @classmethod
  def jit(cls, op, **kwargs):
    kwargs = {"implementation": cls.IMPLEMENTATION} | kwargs
    return jax.jit(
      lambda *args: op(*args, **kwargs),
      compiler_options=cls.COMPILER_OPTIONS,
    )

  def run_op(self, op, *args, **kwargs):
    return self.jitted(op, **kwargs)(*args)

  def topk(self, args, k):
    return np.asarray(self.run_op(pallas_kernels.indexer_topk, *args, k=k))

  def check_selection(self, args, k):
    """Selected scores are the k largest of the loop, to rounding."""
    actual = self.topk(args, k)
    expected = loops.indexer_scores(*args)
    tolerance = tolerances.tolerance("float32", args[0].shape[-1] * 16)
    for row in np.ndindex(actual.shape[:2]):
      scores, chosen = expected[row], actual[row][actual[row] >= 0]
      want = loops.select(scores, k)
      want = want[want >= 0]
      self.assertLen(chosen, len(want))
      self.assertTrue(np.all(np.diff(chosen) > 0), row)
      np.testing.assert_array_equal(actual[row][len(chosen) :], -1)
      # Where rounding can't matter the sets are equal.
      np.testing.assert_allclose(
        np.sort(scores[chosen]), np.sort(scores[want]), **tolerance
      )

  @parameterized.parameters(
    (shapes.SHAPES["tiny"],),
    (shapes.Shape(1, 1, 77, 16, 24, 8),),
    (shapes.Shape(3, 33, 33, 32, 8, 5),),
    (shapes.Shape(1, 7, 130, 64, 16, 31),),
  )
  def test_equals_a_float64_loop(self, shape):
    args = self.inputs(shape)
    scores = self.run_op(pallas_kernels.indexer_scores, *args)
    np.testing.assert_allclose(
      scores,
      loops.indexer_scores(*args),
      **tolerances.tolerance("float32", shape.dim * shape.heads),
    )
    self.check_selection(args, shape.k)

  def test_bfloat16_products_are_summed_in_float32(self):
    shape = shapes.SHAPES["tiny"]
    args = inputs(shape, jnp.bfloat16)
    scores = self.run_op(pallas_kernels.indexer_scores, *args)
    self.assertEqual(scores.dtype, jnp.float32)
    np.testing.assert_allclose(
      scores,
      loops.indexer_scores(
        *(np.asarray(x, np.float64) for x in args[:3]), *args[3:]
      ),
      **tolerances.tolerance("float32", shape.dim * shape.heads),
    )

  def test_segments(self):
    q, k, w, _, end = self.inputs(shapes.SHAPES["tiny"])
    start = jnp.asarray([[0] * 5 + [29] * 2 + [31] * 6] * 2, jnp.int32)
    self.check_selection((q, k, w, start, end), 8)

  def test_queries_without_keys(self):
    args = self.inputs(shapes.SHAPES["tiny"], offset=-5)
    self.check_selection(args, 8)
    np.testing.assert_array_equal(self.topk(args, 8)[:, :5], -1)

  def test_all_masked(self):
    q, k, w, _, end = self.inputs(shapes.SHAPES["tiny"])
    np.testing.assert_array_equal(self.topk((q, k, w, end, end), 8), -1)

  def test_a_start_behind_the_end_leaves_no_key(self):
    q, k, w, start, end = self.inputs((2, 5, 200, 16, 8))
    start = start.at[:, 2:].set(120)
    end = end.at[:, 1:].set(90)
    args = (q, k, w, start, end)
    self.check_selection(args, 7)
    np.testing.assert_array_equal(self.topk(args, 7)[:, 2:], -1)
    scores = self.run_op(pallas_kernels.indexer_scores, *args)
    np.testing.assert_array_equal(scores[:, 2:], -np.inf)

  def test_k_of_at_least_all_keys(self):
    for k in (20, 40):
      self.check_selection(self.inputs((1, 20, 20, 16, 8)), k)

  def test_zero_scores_of_either_sign_tie_to_the_lower_index(self):
    # Products below zero: every score is a sum of 0 times either sign.
    q = -jnp.ones((1, 1, 16, 4), self.DTYPE)
    k = jnp.ones((1, 30, 4), self.DTYPE)
    w = jnp.asarray(
      np.random.default_rng(0).normal(size=(1, 1, 16)), jnp.float32
    )
    start = jnp.zeros((1, 1), jnp.int32)
    chosen = self.topk((q, k, w, start, start + 30), 7)
    np.testing.assert_array_equal(chosen[0, 0], np.arange(7))

  def test_nan_in_unseen_keys_touches_nothing(self):
    q, k, w, start, end = self.inputs(shapes.SHAPES["tiny"], offset=2)
    poisoned = k.at[:, int(end.max()) :].set(jnp.nan)

    def loss(q, k, w):
      scores = pallas_kernels.indexer_scores(
        q, k, w, start, end, implementation=self.IMPLEMENTATION
      )
      return jnp.sum(jnp.where(scores > -jnp.inf, scores, 0.0) ** 2)

    run = jax.jit(jax.value_and_grad(loss, (0, 2)))
    clean, dirty = run(q, k, w), run(q, poisoned, w)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    np.testing.assert_array_equal(
      self.topk((q, k, w, start, end), 8),
      self.topk((q, poisoned, w, start, end), 8),
    )

  def test_less_memory_changes_no_index(self):
    args = self.inputs((2, 11, 64, 16, 8))
    whole = self.topk(args, 9)
    for name, queries in (
      ("windows of five queries", 2 * 5),
      ("less than a query at a time", 0.5),
    ):
      with self.subTest(name):
        scores_bytes = int(4 * 64 * queries)
        run = self.jitted(
          pallas_kernels.indexer_topk, k=9, memory_bytes=8 * scores_bytes
        )
        np.testing.assert_array_equal(run(*args), whole)

  def test_run_to_run_bit_equal(self):
    args = self.inputs(shapes.SHAPES["tiny"])
    run = self.jitted(pallas_kernels.indexer_topk, k=8)
    first = np.asarray(run(*args))
    for _ in range(3):
      np.testing.assert_array_equal(run(*args), first)

  def test_selected_scores_are_those_of_all_keys(self):
    args = self.inputs(shapes.SHAPES["tiny"], offset=3)
    indices = self.topk(args, 8)
    actual = self.run_op(
      pallas_kernels.selected_indexer_scores,
      *args[:3],
      indices,
      implementation=self.SELECTED_IMPLEMENTATION,
    )
    every = np.asarray(self.run_op(pallas_kernels.indexer_scores, *args))
    expected = np.where(
      indices < 0, -np.inf, np.take_along_axis(every, indices.clip(0), -1)
    )
    np.testing.assert_allclose(
      actual, expected, **tolerances.tolerance("float32", 16 * 16)
    )

  def test_gradients_of_both_forms_agree(self):
    args = self.inputs((1, 11, 30, 16, 8), offset=9)
    indices = jnp.asarray(self.topk(args, 40))  # Every visible key.

    def loss(form, q, k, w):
      scores = form(q, k, w)
      return jnp.sum(jnp.where(scores > -jnp.inf, jnp.sin(scores), 0.0))

    def every(q, k, w):
      return pallas_kernels.indexer_scores(
        q, k, w, *args[3:], implementation=self.IMPLEMENTATION
      )

    def selected(q, k, w):
      return pallas_kernels.selected_indexer_scores(
        q, k, w, indices, implementation=self.SELECTED_IMPLEMENTATION
      )

    grads = [
      jax.jit(jax.grad(lambda *x, f=form: loss(f, *x), (0, 1, 2)))(*args[:3])
      for form in (every, selected)
    ]
    tolerance = tolerances.tolerance(self.DTYPE, 30 * 16, grads=True)
    for a, b in zip(*grads, strict=True):
      self.assertTrue(np.any(np.asarray(a)))
      np.testing.assert_allclose(a, b, **tolerance)

  def test_selection_has_no_gradient(self):
    args = self.inputs(shapes.SHAPES["tiny"])

    def loss(q):
      indices = pallas_kernels.indexer_topk(
        q, *args[1:], k=8, implementation=self.IMPLEMENTATION
      )
      return jnp.sum(indices.astype(jnp.float32)) + jnp.sum(q)

    grad = jax.jit(jax.grad(loss), compiler_options=self.COMPILER_OPTIONS)
    np.testing.assert_array_equal(grad(args[0]), 1.0)

  def test_holds_no_array_of_queries_by_keys(self):
    shape = (1, 1 << 14, 1 << 14, 16, 8)
    args = jax.eval_shape(lambda: self.inputs((*shape,)))
    run = self.jitted(pallas_kernels.indexer_topk, k=8)
    compiled = run.lower(*args).compile()
    # One float32 array of T x S is 1 GiB.
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 0.75 * 2**30)
    run = self.jitted(pallas_kernels.indexer_topk, k=8, memory_bytes=1 << 26)
    compiled = run.lower(*args).compile()
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 1 << 26)

  def test_holds_no_scores_of_all_sequences(self):
    # Primes: no window of theirs divides them.
    for batch, queries in ((61, 1), (3, 1021)):
      with self.subTest(batch=batch, queries=queries):
        shape = (batch, queries, 1 << 16, 16, self.UNCOPIED_DIM or 8)
        args = jax.eval_shape(lambda shape=shape: self.inputs(shape))
        memory = 1 << 24
        run = self.jitted(pallas_kernels.indexer_topk, k=8, memory_bytes=memory)
        compiled = run.lower(*args).compile()
        copied_keys = (
          0 if self.UNCOPIED_DIM else args[1].size * args[1].dtype.itemsize
        )
        self.assertLess(
          compiled.memory_analysis().temp_size_in_bytes, memory + copied_keys
        )

  def test_windows_of_sequences_change_no_index(self):
    args = self.inputs((5, 3, 64, 16, 8))
    whole = self.topk(args, 9)
    run = self.jitted(
      pallas_kernels.indexer_topk, k=9, memory_bytes=2 * 8 * 4 * 64
    )
    np.testing.assert_array_equal(run(*args), whole)

  def test_errors(self):
    q, k, w, start, end = self.inputs((1, 4, 10, 16, 8))
    with errors.unchecked():
      with self.assertRaisesRegex(ValueError, r"index_k.shape=\(1, 10, 7\)"):
        pallas_kernels.indexer_topk(q, k[..., :7], w, start, end, k=3)
      with self.assertRaisesRegex(ValueError, r"weights.shape=\(1, 4, 15\)"):
        pallas_kernels.indexer_scores(q, k, w[..., :15], start, end)
      with self.assertRaisesRegex(ValueError, r"one row a query.*\(1, 3\)"):
        pallas_kernels.indexer_topk(q, k, w, start[:, :3], end, k=3)
      with self.assertRaisesRegex(ValueError, "index_topk.*got 0"):
        pallas_kernels.indexer_topk(q, k, w, start, end, k=0)
      with self.assertRaisesRegex(ValueError, "memory_bytes.*got 0"):
        pallas_kernels.indexer_topk(q, k, w, start, end, k=3, memory_bytes=0)


class TransformedTest(absltest.TestCase):
  """Gradients that are traced apart from the scores."""

  IMPLEMENTATION = "xla"
  DTYPE = jnp.float32

  def test_gradient_of_a_jitted_map(self):
    # The backward pass is traced when the forward pass's trace is gone.
    q, k, w, start, end = inputs((2, 6, 30, 16, 8), self.DTYPE, offset=9)

    def loss(q, start, end):
      def add(total, bounds):
        scores = pallas_kernels.indexer_scores(
          q, k, w, *bounds, implementation=self.IMPLEMENTATION
        )
        return total + jnp.sum(jnp.where(scores > -jnp.inf, scores, 0.0)), None

      bounds = jnp.stack([start, start]), jnp.stack([end, end - 1])
      return jax.lax.scan(add, jnp.float32(0), bounds)[0]

    def once(q, end):
      scores = pallas_kernels.indexer_scores(
        q, k, w, start, end, implementation="xla"
      )
      return jnp.sum(jnp.where(scores > -jnp.inf, scores, 0.0))

    actual = jax.grad(jax.jit(loss))(q, start, end)
    expected = jax.grad(once)(q, end) + jax.grad(once)(q, end - 1)
    np.testing.assert_allclose(
      np.asarray(actual, np.float32),
      np.asarray(expected, np.float32),
      **tolerances.tolerance(self.DTYPE, 30 * 16, grads=True),
    )


class KeyScaleTest(parameterized.TestCase):
  """Quantised keys and queries."""

  IMPLEMENTATION = "xla"

  def tolerance(self):
    return tolerances.tolerance("float32", 32 * 16)

  def run_op(self, op, args, scale, **kwargs):
    return jax.jit(
      lambda *args, scale: op(
        *args,
        key_scale=scale,
        implementation=self.IMPLEMENTATION,
        **kwargs,
      )
    )(*args, scale=scale)

  def arguments(self, shape=(2, 13, 40, 16, 32)):
    """Arguments, and the same without scales."""
    q, k, w, start, end = inputs(shape, offset=20)
    (q, q_scale), (k, k_scale) = map(quantization.quantize_rows, (q, k))
    widened = [x.astype(jnp.float32) for x in (q, k)]
    widened = widened[0] * q_scale[..., None], widened[1] * k_scale[..., None]
    return (q, k, w * q_scale, start, end), k_scale, (*widened, w, start, end)

  def test_scales_scores(self):
    args, scale, widened = self.arguments()
    actual = self.run_op(pallas_kernels.indexer_scores, args, scale)
    np.testing.assert_allclose(
      actual, loops.indexer_scores(*widened), **self.tolerance()
    )

  def test_scales_decide_the_selection(self):
    (q, k, w, start, end), scale, _ = self.arguments()
    # Every score is positive, so the five largest scales win.
    q, k, w = jnp.abs(q), jnp.ones_like(k), jnp.ones_like(w)
    start, end = jnp.zeros_like(start), jnp.full_like(end, k.shape[1])
    chosen = self.run_op(
      pallas_kernels.indexer_topk, (q, k, w, start, end), scale, k=5
    )
    for b in range(2):
      want = np.sort(np.argsort(-np.asarray(scale[b]))[:5])
      np.testing.assert_array_equal(chosen[b], np.tile(want, (13, 1)))

  def test_scale_of_unseen_keys_touches_nothing(self):
    args, scale, _ = self.arguments()
    key_end = int(np.max(args[-1])) - 3
    args = (*args[:-1], jnp.minimum(args[-1], key_end))

    def loss(w, scale):
      scores = pallas_kernels.indexer_scores(
        *args[:2], w, *args[3:], key_scale=scale,
        implementation=self.IMPLEMENTATION,
      )  # fmt: skip
      return jnp.sum(jnp.where(scores > -jnp.inf, scores, 0.0))

    run = jax.jit(jax.value_and_grad(loss))
    clean = run(args[2], scale)
    dirty = run(args[2], scale.at[:, key_end:].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)

  def test_errors(self):
    args, scale, _ = self.arguments()
    with errors.unchecked():
      for op in (
        pallas_kernels.indexer_scores,
        lambda *args, **kwargs: pallas_kernels.indexer_topk(
          *args, k=2, **kwargs
        ),
      ):
        with self.assertRaisesRegex(ValueError, r"key_scale.shape=\(2, 39\)"):
          op(*args, key_scale=scale[:, 1:])
        with self.assertRaisesRegex(NotImplementedError, "no factor on a key"):
          op(*args, key_scale=scale, implementation="mosaic_tpu")


class QuantizationTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_rows_times_scale_are_near_the_rotated_rows(self, rotate):
    x = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    rows, scale = quantization.quantize_rows(jnp.asarray(x), rotate=rotate)
    self.assertEqual((rows.dtype, scale.shape), (jnp.float8_e4m3fn, (3, 5)))
    expected = x @ scipy.linalg.hadamard(64) / 8 if rotate else x
    # Half a step of 3 bits behind the leading one, or of the least number.
    least = np.asarray(scale)[..., None] * 2**-10
    self.assertTrue(
      np.all(
        np.abs(np.asarray(rows, np.float32) * scale[..., None] - expected)
        <= np.abs(expected) / 16 * 1.001 + least
      )
    )

  def test_rotation_leaves_products_and_spreads_an_outlier(self):
    rng = np.random.default_rng(1)
    q, k = (rng.normal(size=(32, 128)).astype(np.float32) for _ in range(2))
    k[:, 3] *= 300

    def products(rotate):
      rows, scale = zip(
        *(
          quantization.quantize_rows(jnp.asarray(x), rotate=rotate)
          for x in (q, k)
        ),
        strict=True,
      )
      q8, k8 = (
        np.asarray(x, np.float64) * np.asarray(s)[:, None]
        for x, s in zip(rows, scale, strict=True)
      )
      return q8 @ k8.T

    exact = q.astype(np.float64) @ k.T
    size = np.linalg.norm(exact)
    self.assertLess(np.linalg.norm(products(True) - exact), 0.1 * size)

  def test_rows_without_a_finite_reciprocal(self):
    x = jnp.asarray([[0.0] * 8, [1e-45] * 8, [3e38] * 8], jnp.float32)
    rows, scale = quantization.quantize_rows(x)
    self.assertTrue(np.all(np.asarray(scale) > 0))
    self.assertTrue(np.all(np.isfinite(np.asarray(rows, np.float32))))
    self.assertEqual(float(scale[0]), 1.0)
    np.testing.assert_array_equal(np.asarray(rows[2], np.float32), 448.0)

  def test_rotation_needs_a_power_of_two(self):
    with self.assertRaisesRegex(ValueError, "power of two for D: got 24"):
      quantization.quantize_rows(jnp.ones((2, 24)), rotate=True)


if __name__ == "__main__":
  absltest.main()
