# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from experiments.kernel_workloads import base
from pallas_kernels.expert_mlp import mosaic_gpu_few_rows as few_rows


def expert_mlp() -> list[base.Workload]:
  """From one token to a chunk of a prefill, and with the shared expert."""
  experts, choices, width, inner = 64, 4, 2048, 1536

  def make(key, tokens, with_shared):
    keys = jax.random.split(key, 5)
    # Every expert gets as many rows as another.
    chosen = jnp.arange(tokens * choices, dtype=jnp.int32) % experts
    matrix = inner**-0.5 * base.normal(keys[0], (3, experts, width, inner))
    args = (
      base.normal(keys[1], (tokens, width)),
      chosen.reshape(tokens, choices),
      jax.random.uniform(keys[2], (tokens, choices)),
      matrix[0],
      matrix[1],
      matrix[2].swapaxes(1, 2),
    )
    if not with_shared:
      return args
    shared = inner**-0.5 * base.normal(keys[3], (3, width, inner))
    return (*args, pk.SharedExpert(shared[0], shared[1], shared[2].T))

  def check(args, out):
    rows, chosen, weights, *matrices = args
    few = slice(0, 8)
    expected = pk.expert_mlp(
      rows[few].astype(jnp.float32),
      chosen[few],
      weights[few],
      *jax.tree.map(lambda x: x.astype(jnp.float32), matrices),
      implementation="xla",
    )
    return base.relative_error(out[few], expected)

  def workload(tokens, with_shared=False):
    expert = 3 * width * inner
    is_few = tokens <= few_rows.MAX_ROWS
    read = (min(tokens * choices, experts) + with_shared) * expert * 2
    return base.Workload(
      op="expert_mlp",
      name=f"{tokens} tokens, 4 of 64 experts 2048x1536"
      + (", one shared" if with_shared else ""),
      make=functools.partial(make, tokens=tokens, with_shared=with_shared),
      function=pk.expert_mlp,
      error=check,
      tolerance=1e-2,
      work=read if is_few else 2 * tokens * (choices + with_shared) * expert,
      unit="TB/s" if is_few else "TFLOP/s",
      ceiling="copy" if is_few else "bfloat16",
    )

  alone = [workload(tokens) for tokens in (1, 16, 64, 5000)]
  return alone + [workload(tokens, with_shared=True) for tokens in (1, 64)]
