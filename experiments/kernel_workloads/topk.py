# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Selection of the largest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from experiments.kernel_workloads import base

# Rows, keys, what the scores are like.
_TOP_K = {
  "4096x32768": (4096, 32768, "normal"),
  "1024x131072": (1024, 131072, "normal"),
  "1024x131072 98% ties": (1024, 131072, "ties"),
  "1024x131072 narrow band": (1024, 131072, "narrow"),
  "64x131072": (64, 131072, "normal"),
  "8x131072": (8, 131072, "normal"),
  "1x131072": (1, 131072, "normal"),
  "128x1048576": (128, 1048576, "normal"),
  "1x1048576": (1, 1048576, "normal"),
}


def _scores(key, rows, num_keys, kind):
  scores = base.normal(key, (rows, num_keys), jnp.float32)
  if kind == "ties":
    is_tie = jax.random.uniform(key, scores.shape) < 0.98
    return jnp.where(is_tie, 0.0, jnp.abs(scores))
  if kind == "narrow":
    # A few thousand neighbouring floats.
    return 1.0 + scores * (256 * np.finfo(np.float32).eps)
  return scores


def top_k() -> list[base.Workload]:
  """Rows of many lengths, among them ties in bulk and a narrow band."""

  def check(args, out):
    (scores,) = args
    rows = slice(0, base.CHECKED)
    expected = pk.top_k(scores[rows], 2048, implementation="xla")
    return float(jnp.sum(out[rows] != expected))

  return [
    base.Workload(
      op="top_k",
      name=name,
      make=lambda key, s=(rows, num_keys, kind): (_scores(key, *s),),
      function=functools.partial(pk.top_k, k=2048),
      error=check,
      tolerance=0,
      work=4 * rows * num_keys,
      unit="TB/s",
      ceiling="copy",
    )
    for name, (rows, num_keys, kind) in _TOP_K.items()
  ]
