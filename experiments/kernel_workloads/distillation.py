# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What distils an indexer: scores of selected keys, and the teacher."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from experiments.kernel_workloads import base, indexer


def selected_scores() -> list[base.Workload]:
  """Scores of selected keys, and their gradient."""
  queries, num_keys, heads, k = 4096, 32768, 32, 2048

  def inputs(key):
    index_q, index_k, weights, *_ = indexer.indexer_inputs(
      key, 1, queries, num_keys, heads, jnp.bfloat16
    )
    return (
      index_q,
      index_k,
      weights,
      base.selection(key, 1, queries, num_keys, k),
    )

  def check(args, out):
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

  def make_backward(key):
    *arrays, selected = inputs(key)
    out, vjp = base.pull_back(
      lambda *arrays: pk.selected_indexer_scores(*arrays, selected), *arrays
    )
    return vjp, base.normal(key, out.shape, jnp.float32), *arrays, selected

  def check_backward(args, out):
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

  shared = {
    "name": f"{queries}x{num_keys} {heads} heads",
    "unit": "TFLOP/s",
    "ceiling": "bfloat16",
  }
  flops = 2 * queries * k * heads * 128
  return [
    base.Workload(
      op="selected_indexer_scores",
      make=inputs,
      function=pk.selected_indexer_scores,
      error=check,
      tolerance=1e-5,
      work=flops,
      **shared,
    ),
    base.Workload(
      op="selected_indexer_scores_backward",
      make=make_backward,
      function=lambda vjp, grad, *_: vjp(grad),
      error=check_backward,
      tolerance=8e-3,
      # The products again, and one each for queries and keys.
      work=3 * flops,
      **shared,
    ),
  ]


def dense_attention() -> list[base.Workload]:
  """The teacher of the warm-up."""

  def make(key, heads, queries=512, num_keys=32768):
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
      name=f"512x32768 {heads} heads",
      make=functools.partial(make, heads=heads),
      function=run,
      error=check,
      tolerance=1e-4,
      # Logits twice: for the sum, then for the probabilities.
      work=2 * 2 * base.causal_pairs(512, 32768) * heads * 576,
      unit="TFLOP/s",
      ceiling="bfloat16",
    )
    for heads in (64, 20)
  ]
