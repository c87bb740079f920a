# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of rows, as ascending indices."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.topk import mosaic_gpu, mosaic_tpu, reference

_IMPLEMENTATIONS = {
  "mosaic_gpu": mosaic_gpu.top_k,
  "mosaic_tpu": mosaic_tpu.top_k,
  "xla": reference.top_k,
}
_ORDER: dict[str, tuple[str, ...]] = {
  "gpu": ("mosaic_gpu",),
  "tpu": ("mosaic_tpu",),
}


def top_k(
  scores: Float32[Array, "*B S"],
  k: int,
  lengths: Int32[Array, "*B"] | None = None,
  *,
  implementation: str | None = None,
) -> Int32[Array, "*B {k}"]:
  """Selects the k largest scores of each row, exactly.

  Equal scores go to the lower index, and -0.0 equals 0.0 (the ReLU of an
  indexer makes both in bulk). -inf and NaN are never selected: -inf is how
  `indexer_scores` marks a key that a query does not see.

  Args:
    scores: any float32 values.
    k: indices wanted a row; may exceed S.
    lengths: only the first `lengths` scores of a row count; None: all.
      Whatever stands behind them is not read.
    implementation: "mosaic_gpu", "mosaic_tpu", "xla"; None: the best for this
      platform.

  Returns:
    Indices in ascending order, -1 at the row's end where fewer than k scores
    could be selected. Bit-equal from run to run.

  Raises:
    ValueError: k below 1, or shapes that do not fit.
  """
  if k < 1:
    raise ValueError(f"`k` must be at least 1: got {k}.")
  if lengths is not None and lengths.shape != scores.shape[:-1]:
    raise ValueError(
      "`lengths` must have one entry a row of `scores`: got"
      f" lengths.shape={lengths.shape}, scores.shape={scores.shape}."
    )
  if not scores.size:
    return jnp.full((*scores.shape[:-1], k), -1, jnp.int32)
  return dispatch.run(
    "top_k", _IMPLEMENTATIONS, _ORDER, implementation, scores, k, lengths
  )
