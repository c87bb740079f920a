# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What distils an indexer: scores of selected keys, and the teacher."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from experiments.kernel_workloads import base, indexer

# Queries and heads of the selected scores, and keys that each query selects.
_QUERIES, _HEADS, _SELECTED = 4096, 32, 2048
_NUM_KEYS = (32768, 131072, 1048576)


def selected_scores() -> list[base.Workload]:
  """Scores of selected keys, and their gradient, up to a million keys."""
  return [
    workload
    for num_keys in _NUM_KEYS
    for workload in _selected_scores(num_keys)
  ]


def _selected_scores(num_keys):
  shared = {
    "name": f"{_QUERIES}x{num_keys} {_HEADS} heads",
    "unit": "TFLOP/s",
    "ceiling": "bfloat16",
  }
  flops = 2 * _QUERIES * _SELECTED * _HEADS * 128
  return [
    base.Workload(
      op="selected_indexer_scores",
      make=functools.partial(_selected_inputs, num_keys=num_keys),
      function=pk.selected_indexer_scores,
      error=_scores_error,
      tolerance=1e-5,
      work=flops,
      **shared,
    ),
    base.Workload(
      op="selected_indexer_scores_backward",
      make=functools.partial(_backward_inputs, num_keys=num_keys),
      function=lambda vjp, grad, *_: vjp(grad),
      error=_backward_error,
      tolerance=8e-3,
      # The products again, and one each for queries and keys.
      work=3 * flops,
      **shared,
    ),
  ]


def _selected_inputs(key, num_keys):
  index_q, index_k, weights, *_ = indexer.indexer_inputs(
    key, 1, _QUERIES, num_keys, _HEADS, jnp.bfloat16
  )
  return (
    index_q,
    index_k,
    weights,
    base.selection(key, 1, _QUERIES, num_keys, _SELECTED),
  )


def _scores_error(args, out):
  index_q, index_k, weights, selected = args
  few = slice(-base.CHECKED, None)
  expected = pk.selected_indexer_scores(
    index_q[:, few].astype(jnp.float32),
    index_k.astype(jnp.float32),
    weights[:, few],
    selected[:, few],
    implementation="xla",
  )
  return base.relative_error(out[:, few], expected)


def _backward_inputs(key, num_keys):
  *arrays, selected = _selected_inputs(key, num_keys)
  out, vjp = base.pull_back(
    lambda *arrays: pk.selected_indexer_scores(*arrays, selected), *arrays
  )
  return vjp, base.normal(key, out.shape, jnp.float32), *arrays, selected


def _backward_error(args, out):
  _, grad, *arrays, selected = args
  few = slice(0, 64)
  index_q, index_k, weights = (x.astype(jnp.float32) for x in arrays)
  _, vjp = base.pull_back(
    lambda q, w: pk.selected_indexer_scores(
      q, index_k, w, selected[:, few], implementation="xla"
    ),
    index_q[:, few],
    weights[:, few],
  )
  expected = vjp(grad[:, few])
  return max(
    base.relative_error(out[0][:, few], expected[0]),
    base.relative_error(out[2][:, few], expected[1]),
  )


# Queries, keys, heads. Fewer than 128 queries cost as much as 128.
_DENSE = (
  (512, 32768, 64),
  (512, 32768, 20),
  (256, 131072, 64),
  (128, 1048576, 64),
)


def dense_attention() -> list[base.Workload]:
  """The teacher of the warm-up, up to a million keys."""

  def make(key, queries, num_keys, heads):
    keys = jax.random.split(key)
    return (
      base.normal(keys[0], (1, queries, heads, 576)),
      base.normal(keys[1], (1, num_keys, 576)),
      *base.causal_bounds(queries, num_keys),
    )

  def run(*args, implementation=None):
    return pk.dense_mla_residuals(
      *args, scale=base.SCALE, implementation=implementation
    )

  def check(args, out):
    query, kv_latent, start, end = args
    few = slice(-base.CHECKED, None)
    expected = run(
      query[:, few].astype(jnp.float32),
      kv_latent.astype(jnp.float32),
      start[:, few],
      end[:, few],
      implementation="xla",
    )
    return max(
      base.relative_error(a[:, few], b)
      for a, b in zip(out, expected, strict=True)
    )

  return [
    base.Workload(
      op="dense_mla_residuals",
      name=f"{queries}x{num_keys} {heads} heads",
      make=functools.partial(
        make, queries=queries, num_keys=num_keys, heads=heads
      ),
      function=run,
      error=check,
      tolerance=1e-4,
      # Logits twice: for the sum, then for the probabilities.
      work=2 * 2 * base.causal_pairs(queries, num_keys) * heads * 576,
      unit="TFLOP/s",
      ceiling="bfloat16",
    )
    for queries, num_keys, heads in _DENSE
  ]
