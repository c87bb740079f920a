# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of the indexer, and its selection."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from experiments.kernel_workloads import base


def indexer_inputs(key, batch, num_queries, num_keys, heads, dtype):
  """Arguments of the indexer; float8 with the scales of its rows."""
  keys = jax.random.split(key, 3)
  index_q = base.normal(keys[0], (batch, num_queries, heads, 128))
  index_k = base.normal(keys[1], (batch, num_keys, 128))
  weights = base.normal(keys[2], (batch, num_queries, heads), jnp.float32)
  bounds = base.causal_bounds(num_queries, num_keys, batch)
  if dtype == jnp.bfloat16:
    return index_q, index_k, weights, *bounds, None
  index_q, query_scale = jax.jit(pk.quantize_rows)(index_q)
  index_k, key_scale = jax.jit(pk.quantize_rows)(index_k)
  return index_q, index_k, weights * query_scale, *bounds, key_scale


def _last_queries(args):
  """The same call for a few queries at the end, for a check."""
  index_q, index_k, weights, start, end, key_scale = args
  few = slice(-base.CHECKED, None)
  return (
    index_q[:, few],
    index_k,
    weights[:, few],
    start[:, few],
    end[:, few],
    key_scale,
  )


def _dtype_name(dtype):
  return "bf16" if dtype == jnp.bfloat16 else "fp8"


# The tensor cores sum float8 products in fewer bits than float32's.
_SCORE_ERROR = {"bfloat16": 1e-5, "float8_e4m3fn": 5e-4}


def _widened(args):
  """The same call in float32: the reference of the numbers, not the speed."""
  return tuple(
    x.astype(jnp.float32) if x is not None and x.dtype.itemsize < 4 else x
    for x in args
  )


# Queries, keys.
_SCORES = ((4096, 32768), (4096, 131072), (512, 1048576))


def indexer_scores() -> list[base.Workload]:
  """Prefill of both head counts and dtypes, and a million keys."""

  def run(*args):
    return pk.indexer_scores(*args[:5], key_scale=args[5])

  def check(args, out):
    few = _widened(_last_queries(args))
    expected = pk.indexer_scores(
      *few[:5], key_scale=few[5], implementation="xla"
    )
    actual = out[:, -base.CHECKED :]
    if not bool(jnp.all(jnp.isfinite(actual) == jnp.isfinite(expected))):
      return float("inf")
    return base.relative_error(
      *(jnp.where(jnp.isfinite(x), x, 0) for x in (actual, expected))
    )

  return [
    base.Workload(
      op="indexer_scores",
      name=f"{queries}x{num_keys} {heads} heads {_dtype_name(dtype)}",
      make=functools.partial(
        indexer_inputs,
        batch=1,
        num_queries=queries,
        num_keys=num_keys,
        heads=heads,
        dtype=dtype,
      ),
      function=run,
      error=check,
      tolerance=_SCORE_ERROR[jnp.dtype(dtype).name],
      work=2 * base.causal_pairs(queries, num_keys) * heads * 128,
      unit="TFLOP/s",
      ceiling=jnp.dtype(dtype).name,
    )
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn)
    for queries, num_keys in _SCORES
    for heads in (64, 32)
  ]


# Batch, queries, keys.
_INDEXER_TOPK = {
  "4096x131072": (1, 4096, 131072),
  "decode b1 131072": (1, 1, 131072),
  "decode b8 131072": (8, 1, 131072),
  "decode b64 131072": (64, 1, 131072),
  "512x1048576": (1, 512, 1048576),
}


def indexer_topk() -> list[base.Workload]:
  """Prefill, decoding and a million keys, in both dtypes."""

  def run(*args):
    return pk.indexer_topk(*args[:5], k=2048, key_scale=args[5])

  def check(args, out):
    """Share of selected keys whose score is below the reference's least."""
    few = _widened(_last_queries(args))
    slack = 10 * _SCORE_ERROR[args[0].dtype.name]
    scores = pk.indexer_scores(*few[:5], key_scale=few[5], implementation="xla")
    expected = pk.top_k(scores, 2048, implementation="xla")
    actual = np.asarray(out[:, -base.CHECKED :])
    scores, expected = np.asarray(scores), np.asarray(expected)
    wrong = 0
    for row in np.ndindex(actual.shape[:2]):
      least = scores[row][expected[row]].min()
      chosen = actual[row][actual[row] >= 0]
      # Another order of summation may swap neighbours at the boundary.
      wrong += np.sum(scores[row][chosen] < least - slack * abs(least))
      wrong += len(np.unique(chosen)) != len(expected[row])
    return float(wrong)

  return [
    base.Workload(
      op="indexer_topk",
      name=f"{name} 32 heads {_dtype_name(dtype)}",
      make=functools.partial(
        indexer_inputs,
        batch=batch,
        num_queries=queries,
        num_keys=num_keys,
        heads=32,
        dtype=dtype,
      ),
      function=run,
      error=check,
      tolerance=0,
      work=2 * batch * base.causal_pairs(queries, num_keys) * 32 * 128,
      unit="TFLOP/s",
      ceiling=jnp.dtype(dtype).name,
    )
    for dtype in (jnp.float8_e4m3fn, jnp.bfloat16)
    for name, (batch, queries, num_keys) in _INDEXER_TOPK.items()
  ]
