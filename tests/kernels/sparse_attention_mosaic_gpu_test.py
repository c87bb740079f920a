# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The GPU form of sparse MLA on a CPU.

The entry (padding, splits, limits) with a plain form of the kernels; and the
kernels themselves interpreted, with portable copies. What they do on a GPU is
for `tests/gpu/sparse_mla_device_test`.
"""

import dataclasses
import faulthandler
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import chip
from pallas_kernels.sparse_attention import (
  mosaic_gpu,
  quantization,
  reference,
  shapes,
)
from pallas_kernels.sparse_attention import mosaic_gpu_forward as forward
from pallas_kernels.sparse_attention import (
  mosaic_gpu_forward_combine as combine,
)
from pallas_kernels.sparse_attention import (
  mosaic_gpu_forward_few_heads as few_heads,
)
from pallas_kernels.sparse_attention import mosaic_gpu_forward_items as items
from pallas_kernels.sparse_attention import mosaic_gpu_forward_probs as probs
from tests import tolerances
from tests.kernels import (
  errors,
  loops,
  portable_copies,
  shared_rows_test,
  sparse_attention_test,
)

# Not the real number: a few tiny queries must fill more than one wave.
_CHIP = chip.Chip("NVIDIA H200", 20)
# A barrier that nobody arrives at hangs the interpreter.
_TIMEOUT_S = 240
# The narrowest rows that the kernels take in float8.
_FLOAT8 = {"width": 320, "value_dim": 256}


def attend_items(problem, query, table, indices, counts=None):
  """What `mosaic_gpu_forward.call` returns, an item at a time."""
  if problem.share > 1:
    return attend_groups(problem, query, table, indices, counts)
  outs, log_sum_exps = [], []
  for split in range(problem.splits):
    first = split * problem.steps_a_split * items.STEP_KEYS
    last = min(first + problem.steps_a_split * items.STEP_KEYS, problem.count)
    assert last > first
    # The kernel's NaN: whatever nobody may read.
    out, residuals = _reference(problem, query, table, indices[:, first:last])
    outs.append(out)
    log_sum_exps.append(residuals.log_sum_exp)
  log_sum_exp = _by_tile(problem, jnp.stack(log_sum_exps, axis=-1))
  log_sum_exp = log_sum_exp.reshape(problem.items, items.ROWS)
  if problem.splits == 1:
    shape = (*query.shape[:2], problem.value_dim)
    return outs[0].reshape(shape).astype(jnp.bfloat16), log_sum_exp
  out = _by_tile(problem, jnp.stack(outs, axis=3))
  return out.reshape(problem.items, items.ROWS, -1), log_sum_exp


def attend_groups(problem, query, table, entries, counts):
  """The same of groups of queries that share rows."""
  share, heads = problem.share, problem.heads // problem.share
  assert np.all(np.sum(entries >= 0, axis=1) == counts)
  index = jnp.where(entries >= 0, entries & problem.index_mask, -1)
  outs, log_sum_exps = [], []
  for number in range(share):
    has = (entries >= 0) & (entries >> (31 - share + number) & 1 == 1)
    out, residuals = _reference(
      problem,
      query[:, number * heads : (number + 1) * heads],
      table,
      jnp.where(has, index, -1),
    )
    outs.append(out)
    log_sum_exps.append(residuals.log_sum_exp)
  log_sum_exp = _by_tile(
    problem, jnp.concatenate(log_sum_exps, axis=-1)[..., None]
  )
  shape = (*query.shape[:2], problem.value_dim)
  return (
    jnp.concatenate(outs, axis=2).reshape(shape).astype(jnp.bfloat16),
    log_sum_exp.reshape(problem.items, items.ROWS),
  )


def merge_rows(indices, share):
  """What `mosaic_gpu_shared_rows.call` returns."""
  groups = len(indices) // share
  shape = (groups, share * indices.shape[1])
  return jax.pure_callback(
    lambda indices: shared_rows_test.looped(np.asarray(indices), share),
    (
      jax.ShapeDtypeStruct(shape, jnp.int32),
      jax.ShapeDtypeStruct((groups,), jnp.int32),
    ),
    indices,
  )


def join_items(problem, num_heads, outs, log_sum_exps):
  """What `mosaic_gpu_forward_combine.call` returns."""
  shape = (-1, problem.head_tiles, problem.splits, items.ROWS)
  weights = jax.nn.softmax(log_sum_exps.reshape(shape), axis=2)
  # Of a query without rows; elsewhere NaN is of heads that it lacks.
  weights = jnp.where(jnp.isnan(weights), 0, weights)
  joined = weights[..., None] * outs.reshape(*shape, problem.value_dim)
  joined = joined.sum(axis=2).reshape(problem.flat_queries, -1, outs.shape[-1])
  return joined[:, :num_heads].astype(jnp.bfloat16)


def _by_tile(problem, x):
  """`[B, T, N, splits, ...]` as `[F, tiles, splits, 64, ...]`; NaN behind."""

  def extend(x, axis, size):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=jnp.nan)

  x = x.reshape(problem.flat_queries, *x.shape[2:])
  x = extend(x, 1, problem.head_tiles * problem.heads)
  tiled = (problem.flat_queries, problem.head_tiles, problem.heads)
  x = x.reshape(*tiled, *x.shape[2:])
  return extend(jnp.moveaxis(x, 3, 2), 3, items.ROWS)


def sum_probs(problem, query, table, indices, log_sum_exp):
  """What `mosaic_gpu_forward_probs.call` returns."""
  assert problem.splits == 1
  query = query[:, : log_sum_exp.shape[1]]
  rows = table.reshape(problem.batch, problem.num_keys, -1)
  selected = indices.reshape(problem.batch, problem.num_queries, -1)
  rows = jax.vmap(lambda rows, i: rows[i])(rows, selected)
  logits = problem.scale * jnp.einsum(
    "fnc,fkc->fnk",
    query.astype(jnp.float32),
    rows.reshape(*indices.shape, -1).astype(jnp.float32),
    precision="highest",
  )
  probs = jnp.exp(logits - log_sum_exp[..., None])
  probs = jnp.where(indices[:, None] >= 0, probs, 0)
  first, second = probs[:, : problem.heads], probs[:, problem.heads :]
  tiles = (first, second)[: problem.head_tiles]
  return jnp.stack([tile.sum(axis=1) for tile in tiles])


def _reference(problem, query, table, indices):
  leading = (problem.batch, problem.num_queries)
  return reference.sparse_mla(
    query.reshape(*leading, *query.shape[1:]).astype(jnp.float32),
    table.reshape(problem.batch, problem.num_keys, -1).astype(jnp.float32),
    indices.reshape(*leading, -1),
    scale=problem.scale,
    value_dim=problem.value_dim,
  )


def differentiate(
  query,
  kv_latent,
  indices,
  out,
  log_sum_exp,
  grad_out,
  grad_log_sum_exp,
  grad_mean_probs,
  *,
  scale,
  value_dim,
):
  """XLA's gradient in the place of the kernel's."""
  assert grad_log_sum_exp is None
  assert grad_mean_probs is None
  assert out.shape == grad_out.shape
  assert log_sum_exp.shape == query.shape[:3]
  _, vjp = jax.vjp(
    lambda *args: reference.sparse_mla(
      *args, indices, scale=scale, value_dim=value_dim
    )[0],
    query,
    kv_latent,
  )
  return vjp(grad_out)


def setup(test, device=_CHIP):
  for target, name, substitute in (
    (chip, "chip", lambda: device),
    (mosaic_gpu.forward, "call", attend_items),
    (mosaic_gpu.few_heads, "call", attend_items),
    (mosaic_gpu.combine, "call", join_items),
    (mosaic_gpu.shared_rows, "call", merge_rows),
    (mosaic_gpu.probs, "call", sum_probs),
    (mosaic_gpu.backward, "sparse_mla_backward", differentiate),
  ):
    test.enter_context(mock.patch.object(target, name, substitute))


class SharedTest(sparse_attention_test.SparseMLATest):
  IMPLEMENTATION = "mosaic_gpu"
  DTYPES = ("bfloat16",)

  def setUp(self):
    super().setUp()
    setup(self)
    # What it traced holds the plain forms.
    self.addCleanup(sparse_attention_test.jitted.cache_clear)


class EntryTest(parameterized.TestCase):
  @parameterized.parameters(
    # Head tiles, splits and paddings of every kind.
    shapes.Shape(1, 1, 700, 70, 24, 16, 600),
    shapes.Shape(2, 3, 300, 5, 130, 70, 260),
    shapes.Shape(1, 30, 40, 128, 64, 64, 16),
  )
  def test_pads_and_splits(self, *shape):
    setup(self)
    shape = shapes.Shape(*shape)
    query, latent, indices = sparse_attention_test.inputs(shape, "bfloat16")
    rng = np.random.default_rng(0)
    indices = rng.integers(-1, shape.num_keys, size=indices.shape)
    indices = jnp.asarray(indices, jnp.int32).at[:, 0, ::2].set(-1)
    args = (query, latent, indices)
    out, residuals = jax.jit(
      lambda *args: mosaic_gpu.sparse_mla(
        *args, scale=0.3, value_dim=shape.value_dim
      )
    )(*args)
    expected = loops.sparse_mla(*args, 0.3, shape.value_dim)
    sparse_attention_test.assert_results_close(
      (out, residuals),
      expected,
      tolerances.tolerance("bfloat16"),
      shape.latent_dim,
    )

  @parameterized.parameters(
    # Of 20 heads 3 queries are together, of 32 2, of 33 none; lengths that they
    # do not divide, in both of two sequences.
    shapes.Shape(2, 7, 90, 20, 64, 64, 24),
    shapes.Shape(1, 9, 40, 32, 96, 40, 130),
    shapes.Shape(1, 9, 40, 33, 64, 64, 16),
  )
  def test_neighbours_share_rows(self, *shape):
    # As many groups as it has multiprocessors are enough to share.
    setup(self, chip.Chip("NVIDIA H200", 4))
    shape = shapes.Shape(*shape)
    query, latent, indices = sparse_attention_test.inputs(shape, "bfloat16")
    rng = np.random.default_rng(0)
    indices = shared_rows_test.draw(
      rng, *indices.shape[:2], shape.k, shape.num_keys, (24, 9, 0, 130, 1)
    ).reshape(indices.shape)
    args = (query, latent, jnp.asarray(indices))

    def attend(*args, shares_rows=True):
      out, residuals = mosaic_gpu.sparse_mla(
        *args, scale=0.3, value_dim=shape.value_dim, shares_rows=shares_rows
      )
      return out, residuals.log_sum_exp

    with mock.patch.object(
      mosaic_gpu.forward, "call", side_effect=attend_items
    ) as called:
      out, log_sum_exp = attend(*args)
    (problem, *_), _ = called.call_args
    self.assertEqual(problem.share, {20: 3, 32: 2, 33: 1}[shape.heads])
    expected = loops.sparse_mla(*args, 0.3, shape.value_dim)
    np.testing.assert_allclose(
      np.asarray(out, np.float32),
      expected[0],
      **tolerances.tolerance("bfloat16", 4),
    )
    np.testing.assert_allclose(
      log_sum_exp,
      expected[1],
      **tolerances.tolerance("float32", shape.latent_dim),
    )
    grads = [
      jax.grad(
        lambda query, shares_rows=shares_rows: (
          attend(query, *args[1:], shares_rows=shares_rows)[0]
          .astype(jnp.float32)
          .sum()
        )
      )(query)
      for shares_rows in (True, False)
    ]
    np.testing.assert_allclose(
      *(np.asarray(grad, np.float32) for grad in grads),
      **tolerances.tolerance("bfloat16", 4),
    )

  @parameterized.parameters(
    # Queries, heads, rows, keys; how many are together.
    (4096, 20, 2048, 1 << 17, 3),
    (4096, 32, 2048, 1 << 17, 2),
    (4096, 8, 2048, 1 << 17, 4),
    (4096, 64, 2048, 1 << 17, 1),
    # Queries for less than a wave, rows for less than shared memory.
    (264, 20, 2048, 1 << 17, 2),
    (263, 20, 2048, 1 << 17, 1),
    (4096, 8, 4096, 1 << 17, 3),
    # Rows that have no room beside the queries' bits.
    (4096, 20, 2048, 1 << 28, 3),
    (4096, 20, 2048, (1 << 28) + 1, 2),
  )
  def test_how_many_share(self, queries, heads, count, keys, together):
    problem = items.Problem(
      1, queries, keys, heads, 1, 576, 512, count, 1.0, 132
    )
    self.assertEqual(mosaic_gpu.queries_together(problem, heads), together)

  @parameterized.parameters(
    (1, 16, 16), (8, 16, 8), (64, 16, 2), (4096, 16, 1), (1, 1, 1), (3, 5, 5)
  )
  def test_splits_fill_the_chip(self, units, steps, splits):
    self.assertEqual(mosaic_gpu.choose_splits(units, steps, 132), splits)

  def test_every_split_has_a_step(self):
    for units in range(1, 200, 7):
      for steps in range(1, 40):
        splits = mosaic_gpu.choose_splits(units, steps, 132)
        self.assertLess((splits - 1) * -(-steps // splits), steps)

  def test_says_what_it_cannot_run(self):
    def call(heads=4, width=64, dtype="bfloat16", count=8):
      shape = shapes.Shape(1, 4, 40, heads, width, 16, count)
      args = sparse_attention_test.inputs(shape, dtype)
      return mosaic_gpu.sparse_mla(*args, scale=1.0, value_dim=16)

    with self.assertRaisesRegex(NotImplementedError, "Hopper.*got cpu"):
      call()
    setup(self)
    with self.assertRaisesRegex(NotImplementedError, "got float32 and float"):
      call(dtype="float32")
    with self.assertRaisesRegex(NotImplementedError, "128 heads: got 129"):
      call(heads=129)
    with self.assertRaisesRegex(NotImplementedError, "576 columns: got 600"):
      call(width=600)
    with self.assertRaisesRegex(NotImplementedError, "a query, an index"):
      call(count=0)

  def test_says_that_it_counts_in_int32(self):
    setup(self)
    struct = jax.ShapeDtypeStruct
    args = (
      struct((1, 1 << 20, 8, 64), jnp.bfloat16),
      struct((1, 64, 64), jnp.bfloat16),
      struct((1, 1 << 20, 2048), jnp.int32),
    )
    with self.assertRaisesRegex(NotImplementedError, "in int32"):
      jax.eval_shape(
        lambda *args: mosaic_gpu.sparse_mla(*args, scale=1.0, value_dim=64),
        *args,
      )


class InterpretedTest(parameterized.TestCase):
  """The kernels' own logic, every item on one multiprocessor."""

  def setUp(self):
    super().setUp()
    faulthandler.dump_traceback_later(_TIMEOUT_S, exit=True)
    self.addCleanup(faulthandler.cancel_dump_traceback_later)
    self.addCleanup(interpret_pallas_call.reset_gpu_interpret_mode_state)
    # The portable barriers are of other types.
    self.enter_context(errors.unchecked())
    self.enter_context(
      mock.patch.object(items, "rows_scratch", _portable_rows_scratch)
    )
    self.enter_context(
      mock.patch.object(items.Rows, "indices", _portable_indices)
    )
    # Tiles and swizzles are not interpreted, nor is memory of two shapes.
    for name, substitute in (
      ("tiled", lambda *shape: plgpu.SMEM(shape, jnp.bfloat16)),
      ("heads_scratch", _portable_heads_scratch),
      ("head_tiles", lambda ref: items.HeadTiles(ref, ref)),
    ):
      self.enter_context(mock.patch.object(items, name, substitute))

  def problem(self, **changes):
    sizes = {
      "batch": 2,
      "num_queries": 1,
      "num_keys": 150,
      "heads": 8,
      "head_tiles": 1,
      "width": 192,
      "value_dim": 128,
      "count": 256,
      "scale": 0.3,
      "num_multiprocessors": 1,
    }
    return items.Problem(**sizes | changes)

  def inputs(self, problem, is_quantized=False, heads=None):
    rng = np.random.default_rng(0)
    heads = heads or problem.heads * problem.head_tiles
    query = rng.normal(size=(problem.flat_queries, heads, problem.width))
    table = rng.normal(size=(problem.batch * problem.num_keys, problem.width))
    table[:: problem.num_keys] = np.nan
    table = jnp.asarray(table, jnp.bfloat16)
    if is_quantized:
      table = quantization.quantize_latents(table, problem.value_dim)
    indices = rng.integers(
      1 - problem.num_keys // 4,
      problem.num_keys,
      size=(problem.flat_queries, problem.count),
    )
    indices = np.where(indices > 0, indices, -1)
    indices[-1, ::2] = -1
    indices[-1, : items.STEP_KEYS] = -1
    return (
      jnp.asarray(query, jnp.bfloat16),
      table,
      jnp.asarray(indices, jnp.int32),
    )

  def expected(self, problem, query, table, indices):
    leading = (problem.batch, problem.num_queries)
    if isinstance(table, quantization.QuantizedLatents):
      table = quantization.dequantize_latents(table)
    out, log_sum_exp, mean_probs = loops.sparse_mla(
      query.reshape(*leading, *query.shape[1:]),
      table.reshape(problem.batch, problem.num_keys, -1),
      indices.reshape(*leading, -1),
      problem.scale,
      problem.value_dim,
    )
    return (
      out.reshape(*query.shape[:2], -1),
      log_sum_exp.reshape(query.shape[:2]),
      mean_probs.reshape(indices.shape),
    )

  @parameterized.parameters(
    (forward, {}),
    (forward, {"head_tiles": 2, "heads": 64, "batch": 1}),
    (forward, {"width": 128, "batch": 1, "count": 384}),
    (few_heads, {}),
    (few_heads, {"batch": 1, "heads": 16, "count": 384}),
    (forward, _FLOAT8, True),
    (few_heads, {**_FLOAT8, "batch": 1}, True),
    # The tile lacks heads.
    (forward, {"batch": 1}, False, 5),
    (few_heads, {}, False, 5),
  )
  def test_attends(self, kernel, changes, is_quantized=False, heads=None):
    problem = self.problem(**changes)
    args = self.inputs(problem, is_quantized, heads)
    with portable_copies.interpreted(detect_races=True):
      out, log_sum_exp = jax.jit(lambda *args: kernel.call(problem, *args))(
        *args
      )
    expected = self.expected(problem, *args)
    np.testing.assert_allclose(
      np.asarray(out, np.float32),
      expected[0],
      **tolerances.tolerance("bfloat16", 4),
    )
    log_sum_exp = log_sum_exp[:, : problem.heads].reshape(len(out), -1)
    log_sum_exp = log_sum_exp[:, : out.shape[1]]
    np.testing.assert_allclose(
      log_sum_exp, expected[1], **tolerances.tolerance("float32", problem.width)
    )

  def test_shares_rows(self):
    share, heads, queries = 3, 5, 6
    problem = self.problem(
      batch=1,
      num_queries=queries // share,
      heads=share * heads,
      count=share * 128,
      share=share,
    )
    rng = np.random.default_rng(0)
    indices = shared_rows_test.draw(
      rng, queries // share, share, 128, problem.num_keys, (128, 100, 3)
    )
    # A group without rows.
    indices[share:] = -1
    entries, counts = shared_rows_test.looped(indices, share)
    whole = dataclasses.replace(problem, num_queries=queries, heads=heads)
    query, table, _ = self.inputs(whole)
    table = jnp.where(jnp.isnan(table), 0, table)
    args = (query.reshape(queries // share, share * heads, -1), table)
    with portable_copies.interpreted(detect_races=True):
      out, log_sum_exp = jax.jit(lambda *args: forward.call(problem, *args))(
        *args, jnp.asarray(entries), jnp.asarray(counts)
      )
    expected = self.expected(whole, query, table, jnp.asarray(indices))
    np.testing.assert_allclose(
      np.asarray(out, np.float32).reshape(expected[0].shape),
      expected[0],
      **tolerances.tolerance("bfloat16", 4),
    )
    np.testing.assert_allclose(
      log_sum_exp[:, : share * heads].reshape(expected[1].shape),
      expected[1],
      **tolerances.tolerance("float32", problem.width),
    )

  def test_splits(self):
    problem = self.problem(batch=1, splits=2)
    args = self.inputs(problem)
    with portable_copies.interpreted(detect_races=True):
      outs, log_sum_exps = jax.jit(lambda *args: forward.call(problem, *args))(
        *args
      )
    expected = self.expected(problem, *args)
    np.testing.assert_allclose(
      self.combined(problem, 8, outs, log_sum_exps),
      expected[0],
      **tolerances.tolerance("bfloat16", 4),
    )
    np.testing.assert_allclose(
      combine.log_sum_exp(problem, 8, log_sum_exps),
      expected[1],
      **tolerances.tolerance("float32", problem.width),
    )

  def combined(self, problem, num_heads, *parts):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
      out = jax.jit(lambda *parts: combine.call(problem, num_heads, *parts))(
        *parts
      )
    return np.asarray(out, np.float32)

  def test_combines_two_tiles_of_empty_and_full_parts(self):
    problem = self.problem(splits=3, head_tiles=2, heads=64, batch=1)
    rng = np.random.default_rng(0)
    outs = rng.normal(size=(2, 3, 64, problem.value_dim))
    logs = rng.normal(size=(2, 3, 64))
    # Head 0 of each tile: one part alone has rows; head 1: none has.
    logs[:, :2, 0] = logs[:, :, 1] = -np.inf
    outs = np.where(np.isneginf(logs)[..., None], 0, outs)
    # Behind the second tile's heads lies whatever was there.
    outs[1, :, 6:], logs[1, :, 6:] = np.nan, np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
      total = np.exp(logs).sum(axis=1)
      weights = np.exp(logs) / np.where(total == 0, 1, total)[:, None]
      expected = (outs * weights[..., None]).sum(axis=1).reshape(1, 128, -1)
      log_sum_exp = np.log(total).reshape(1, 128)
    parts = (
      jnp.asarray(outs.reshape(6, 64, -1), jnp.float32),
      jnp.asarray(logs.reshape(6, 64), jnp.float32),
    )
    np.testing.assert_allclose(
      self.combined(problem, 70, *parts),
      expected[:, :70],
      **tolerances.tolerance("bfloat16"),
    )
    np.testing.assert_allclose(
      combine.log_sum_exp(problem, 70, parts[1]),
      log_sum_exp[:, :70],
      **tolerances.tolerance("float32"),
    )

  @parameterized.parameters(({}, False), (_FLOAT8, True))
  def test_sums_probabilities(self, changes, is_quantized):
    problem = self.problem(batch=1, num_queries=2, **changes)
    # Of its 8 heads the tile lacks one.
    args = self.inputs(problem, is_quantized, heads=7)
    _, log_sum_exp, mean_probs = self.expected(problem, *args)
    with portable_copies.interpreted(detect_races=True):
      sums = jax.jit(lambda *args: probs.call(problem, *args))(
        *args, jnp.asarray(log_sum_exp, jnp.float32)
      )
    self.assertEqual(sums.shape, (1, *mean_probs.shape))
    np.testing.assert_allclose(
      sums.sum(axis=0),
      7 * mean_probs,
      **tolerances.tolerance("float32", problem.width),
    )

  @parameterized.parameters(({}, False), (_FLOAT8, True))
  def test_rows_released_too_early_are_a_race(self, changes, is_quantized):
    problem = self.problem(batch=1, **changes)
    args = self.inputs(problem, is_quantized)
    with (
      mock.patch.object(items.Rows, "release", _release_early),
      portable_copies.interpreted(detect_races=True),
      # Or the barrier runs ahead of who waits for it, which is refused.
      self.assertRaisesRegex(
        jax.errors.JaxRuntimeError, "RACE DETECTED|already at phase"
      ),
    ):
      jax.jit(lambda *args: forward.call(problem, *args))(*args)


_RELEASE = items.Rows.release


def _release_early(rows, *, half, part, arrivals=1):
  if (half, part) != (0, 1):
    _RELEASE(rows, half=half, part=part, arrivals=arrivals)
    return

  # The first warpgroup releases what the second has yet to read.
  @pl.when(lax.axis_index("warpgroup") == 0)
  def _():
    _RELEASE(rows, half=half, part=part, arrivals=2)


def _portable_rows_scratch(problem):
  rows, _, *free = _ROWS_SCRATCH(problem)
  rows = plgpu.SMEM(rows.shape, jnp.bfloat16)
  accumulators = (max(items.ROWS, problem.value_dim // 2),) * 2
  num_words = items.INDEX_WORDS + items.STEP_KEYS
  words = portable_copies.words_scratch(4, num_words, accumulators)
  return rows, words, *free


_ROWS_SCRATCH = items.rows_scratch


def _portable_heads_scratch(problem, rows):
  return items.tiled(problem.column_tiles, rows, items.TILE)


def _portable_indices(rows, half, layout):
  del layout
  words = rows.words[1]
  return words[
    items.INDEX_WORDS + half * items.ROWS : items.INDEX_WORDS
    + (half + 1) * items.ROWS
  ]


if __name__ == "__main__":
  absltest.main()
