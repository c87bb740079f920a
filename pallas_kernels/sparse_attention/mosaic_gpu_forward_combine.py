# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Joins the parts of a query's rows that different blocks attended to.

A block takes one head of one query. XLA makes three kernels of the same, each
of which costs a decode step of one request more than its bytes do.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.sparse_attention import mosaic_gpu_forward_items as items


def call(
  problem: items.Problem,
  num_heads: int,
  outs: Float32[Array, "items 64 V"],
  log_sum_exps: Float32[Array, "items 64"],
) -> BFloat16[Array, "F N V"]:
  """Runs the kernel.

  Args:
    problem: its sizes.
    num_heads: of a query: N.
    outs: of each part of the rows, its own softmax. Where the part has none of
      a query's rows, zeros.
    log_sum_exps: likewise; -inf there.

  Returns:
    The sums of `outs` by their parts of the whole softmax; zeros for a query
    without rows.
  """
  shape = (problem.flat_queries, num_heads, problem.value_dim)
  return plgpu.kernel(
    functools.partial(_body, problem),
    out_type=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    grid=shape[:2],
    grid_names=("query", "head"),
    kernel_name="sparse_mla_combine",
    compiler_params=dataclasses.replace(
      items.compiler_params(), unsafe_no_auto_barriers=False
    ),
  )(outs, log_sum_exps)


def _body(problem, outs, log_sum_exps, out):
  query, head = lax.axis_index("query"), lax.axis_index("head")
  tile, row = lax.div(head, items.ROWS), lax.rem(head, items.ROWS)
  first = (query * problem.head_tiles + tile) * problem.splits
  parts = [first + split for split in range(problem.splits)]
  logs = [log_sum_exps[part, row] * math.log2(math.e) for part in parts]
  maximum = functools.reduce(jnp.maximum, logs)
  # Without any row there is nothing to subtract from -inf.
  maximum = jnp.where(maximum == -jnp.inf, 0.0, maximum)
  weights = [jnp.exp2(log - maximum) for log in logs]
  total = functools.reduce(lax.add, weights)
  terms = [
    weight * outs[part, row, :]
    for weight, part in zip(weights, parts, strict=True)
  ]
  joined = functools.reduce(lax.add, terms)
  out[query, head, :] = (joined / jnp.where(total == 0, 1.0, total)).astype(
    out.dtype
  )


def log_sum_exp(
  problem: items.Problem,
  num_heads: int,
  log_sum_exps: Float32[Array, "items 64"],
) -> Float32[Array, "F N"]:
  """That of all parts; in XLA, which drops it where nobody reads it."""
  shape = (problem.flat_queries, problem.head_tiles, problem.splits, items.ROWS)
  joined = jax.nn.logsumexp(log_sum_exps.reshape(shape), axis=2)
  return joined.reshape(problem.flat_queries, -1)[:, :num_heads]
