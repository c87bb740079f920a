# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer: scores, and the keys that they select.

`score[t, s] = sum_i weight[t, i] relu(index_q[t, i] . index_k[s])`
(DeepSeek-V3.2 technical report, equation 1), accumulated in float32.
Quantised rows have scales: a query's belongs into its weights, a key's into
`key_scale`, a factor on the score.
"""

import jax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import chunking, dispatch
from pallas_kernels.indexer import (
  mosaic_gpu,
  mosaic_gpu_selected,
  mosaic_tpu,
  reference,
)

_ORDER: dict[str, tuple[str, ...]] = {
  "gpu": ("mosaic_gpu",),
  "tpu": ("mosaic_tpu",),
}
# XLA on a TPU: the selected rows are few.
_SELECTED_ORDER: dict[str, tuple[str, ...]] = {"gpu": ("mosaic_gpu",)}


def indexer_scores(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  *,
  key_scale: Float32[Array, "B S"] | None = None,
  implementation: str | None = None,
) -> Float32[Array, "B T S"]:
  """Scores every key; -inf where `key_start <= s < key_end` does not hold.

  The result is T x S: call it on chunks of queries. Differentiable in the
  first three arguments; what an invisible key holds, NaN too, touches nothing.

  Args:
    index_q: queries, rotated; their dtype is that of the products.
    index_k: one key a token, shared by the heads.
    index_weights: head weights, scale factors included.
    key_start: first visible key of each query.
    key_end: one past its last visible key.
    key_scale: positive factor on the scores of each key, detached; None: 1.
    implementation: "mosaic_gpu", "mosaic_tpu", "xla"; None: the best for this
      platform.

  Returns:
    Float32 scores.

  Raises:
    ValueError: shapes that do not fit.
  """
  _check(index_q, index_k, index_weights, key_start, key_end)
  _check_scale(index_k, key_scale)
  return dispatch.run(
    "indexer_scores",
    {
      "mosaic_gpu": mosaic_gpu.indexer_scores,
      "mosaic_tpu": _without_scale(mosaic_tpu.indexer_scores),
      "xla": reference.indexer_scores,
    },
    _ORDER,
    implementation,
    index_q,
    index_k,
    index_weights,
    key_start,
    key_end,
    key_scale=jax.lax.stop_gradient(key_scale),
  )


def indexer_topk(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  *,
  k: int,
  key_scale: Float32[Array, "B S"] | None = None,
  memory_bytes: int = chunking.MEMORY_BYTES,
  implementation: str | None = None,
) -> Int32[Array, "B T {k}"]:
  """Selects for each query the k visible keys of largest score.

  Exact and deterministic; ties go to the lower index. Not differentiable: the
  arguments are detached.

  Args:
    index_q: queries, rotated.
    index_k: one key a token, shared by the heads.
    index_weights: head weights, scale factors included.
    key_start: first visible key of each query.
    key_end: one past its last visible key.
    k: index_topk.
    key_scale: positive factor on the scores of each key; None: 1.
    memory_bytes: held at most beside arguments and result, for any B, T and S:
      so many queries, of so many sequences, are scored together. One query's
      scores are the least. Not counted is a copy of `index_k`: with "xla"
      always; with "mosaic_gpu" where S is no multiple of 8, or D not 64 or
      128; with "mosaic_tpu" where S is no multiple of its tile.
    implementation: "mosaic_gpu", "mosaic_tpu", "xla"; None: the best for this
      platform.

  Returns:
    Ascending indices; where fewer than k keys are visible, all of them and -1
    behind.

  Raises:
    ValueError: k or `memory_bytes` below 1, or shapes that do not fit.
  """
  _check(index_q, index_k, index_weights, key_start, key_end)
  if k < 1:
    raise ValueError(f"`k` (index_topk) must be at least 1: got {k}.")
  if memory_bytes < 1:
    raise ValueError(
      "`memory_bytes`, what may be held beside arguments and result, must be at"
      f" least 1: got {memory_bytes}. A query's part is held whatever it is:"
      " give 1 for the least."
    )
  _check_scale(index_k, key_scale)
  index_q, index_k, index_weights, key_scale = jax.lax.stop_gradient(
    (index_q, index_k, index_weights, key_scale)
  )
  return dispatch.run(
    "indexer_topk",
    {
      "mosaic_gpu": mosaic_gpu.indexer_topk,
      "mosaic_tpu": _without_scale(mosaic_tpu.indexer_topk),
      "xla": reference.indexer_topk,
    },
    _ORDER,
    implementation,
    index_q,
    index_k,
    index_weights,
    key_start,
    key_end,
    k,
    key_scale=key_scale,
    memory_bytes=memory_bytes,
  )


def selected_indexer_scores(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  topk_indices: Int32[Array, "B T K"],
  *,
  implementation: str | None = None,
) -> Float32[Array, "B T K"]:
  """Scores the selected keys only; -inf where the index is -1.

  Args:
    index_q: queries, rotated.
    index_k: one key a token, shared by the heads.
    index_weights: head weights, scale factors included.
    topk_indices: as `indexer_topk` returns them.
    implementation: "mosaic_gpu", "xla"; None: the best for this platform.

  Returns:
    Float32 scores, differentiable in the first three arguments. Memory
    beyond the result: "xla", chunks of queries, recomputed in the backward
    pass; "mosaic_gpu", backward alone, a float32 copy of `index_k` and less
    than 640 MiB for a chunk of queries.

  Raises:
    ValueError: shapes that do not fit.
  """
  _check(index_q, index_k, index_weights, topk_indices[..., 0])
  return dispatch.run(
    "selected_indexer_scores",
    {
      "mosaic_gpu": mosaic_gpu_selected.selected_indexer_scores,
      "xla": reference.selected_indexer_scores,
    },
    _SELECTED_ORDER,
    implementation,
    index_q,
    index_k,
    index_weights,
    topk_indices,
  )


def _check(index_q, index_k, index_weights, *per_query):
  batch, queries, heads, dim = index_q.shape
  if (index_k.shape[0], index_k.shape[-1]) != (batch, dim):
    raise ValueError(
      "`index_k` must have the batch and head dim of `index_q`: got"
      f" index_k.shape={index_k.shape}, index_q.shape={index_q.shape}."
    )
  if index_weights.shape != (batch, queries, heads):
    raise ValueError(
      "`index_weights` must have one weight a query and head: got"
      f" index_weights.shape={index_weights.shape},"
      f" index_q.shape={index_q.shape}."
    )
  for array in per_query:
    if array.shape != (batch, queries):
      raise ValueError(
        "`key_start`, `key_end` or `topk_indices` must have one row a query:"
        f" got {array.shape}, index_q.shape={index_q.shape}."
      )


def _check_scale(index_k, key_scale):
  if key_scale is not None and key_scale.shape != index_k.shape[:2]:
    raise ValueError(
      "`key_scale` must have one factor a key: got"
      f" key_scale.shape={key_scale.shape}, index_k.shape={index_k.shape}."
    )


def _without_scale(implementation):
  """An implementation that refuses scales."""

  def run(*args, key_scale, **kwargs):
    if key_scale is not None:
      raise NotImplementedError("the kernel has no factor on a key's scores")
    return implementation(*args, **kwargs)

  return run
