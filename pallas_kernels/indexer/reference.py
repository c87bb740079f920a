# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The definition of the lightning indexer, in plain XLA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import chunking, numerics
from pallas_kernels import rows as rows_lib
from pallas_kernels.topk import reference as topk_reference


def indexer_scores(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  key_scale: Float32[Array, "B S"] | None = None,
) -> Float32[Array, "B T S"]:
  """All scores of a chunk of queries, head by head: no I x T x S array."""
  index_q, index_k = map(_widen, (index_q, index_k))
  keys = jnp.arange(index_k.shape[1])
  is_visible = (keys >= key_start[..., None]) & (keys < key_end[..., None])
  # Zeroed, lest the gradient of the queries meet 0 * NaN: keys that no query
  # sees may hold anything.
  is_seen = jnp.any(is_visible, axis=1)
  index_k = jnp.where(is_seen[..., None], index_k, 0)

  # Recomputed, lest the backward pass find I x T x S products kept for it.
  @jax.checkpoint
  def of_head(index_q, weights, index_k):
    products = jnp.einsum(
      "btd,bsd->bts",
      index_q,
      index_k,
      preferred_element_type=jnp.float32,
      precision=numerics.precision(index_q.dtype),
    )
    return weights[..., None] * jax.nn.relu(products)

  def add_head(scores, head):
    return scores + of_head(*head, index_k), None

  heads = (jnp.moveaxis(index_q, 2, 0), jnp.moveaxis(index_weights, 2, 0))
  scores, _ = jax.lax.scan(
    add_head, jnp.zeros(is_visible.shape, jnp.float32), heads
  )
  if key_scale is not None:
    scores *= jnp.where(is_seen, key_scale, 1)[:, None]
  return jnp.where(is_visible, scores, -jnp.inf)


def with_gradient(scores: Callable) -> Callable:
  """Gives a lowering's `indexer_scores` the gradient of the definition.

  Args:
    scores: of the arguments of `indexer_scores`, in their order. The bounds
      must be among them: the backward pass may run in another trace, where
      what a function closed over is gone.
  """

  @jax.custom_vjp
  def differentiable(*args):
    return scores(*args)

  def forward(*args):
    return scores(*args), args

  def backward(args, grad):
    floats, others = args[:3], args[3:]
    _, vjp = jax.vjp(lambda *floats: indexer_scores(*floats, *others), *floats)
    return *vjp(grad), *(None for _ in others)

  differentiable.defvjp(forward, backward)
  return differentiable


def indexer_topk(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  k: int,
  key_scale: Float32[Array, "B S"] | None = None,
  *,
  memory_bytes: int = chunking.MEMORY_BYTES,
) -> Int32[Array, "B T {k}"]:
  """Scores and selects, a chunk of queries at a time."""

  def select(per_query, keys):
    index_q, index_weights, key_start, key_end = per_query
    index_k, key_scale = keys
    scores = indexer_scores(
      index_q, index_k, index_weights, key_start, key_end, key_scale
    )
    return topk_reference.top_k(scores, k, None)

  return chunking.fill_windows(
    select,
    (index_q, index_weights, key_start, key_end),
    (index_k, key_scale),
    bytes_each=4 * index_k.shape[1],
    memory_bytes=memory_bytes,
  )


def selected_indexer_scores(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  topk_indices: Int32[Array, "B T K"],
) -> Float32[Array, "B T K"]:
  """Scores of the selected keys."""

  def score(index_q, index_weights, topk_indices):
    is_selected = topk_indices >= 0
    rows = rows_lib.gather_rows(index_k, topk_indices)
    products = jnp.einsum(
      "btid,btkd->btik",
      index_q,
      rows,
      preferred_element_type=jnp.float32,
      precision=numerics.precision(index_q.dtype),
    )
    scores = jnp.sum(index_weights[..., None] * jax.nn.relu(products), axis=2)
    return jnp.where(is_selected, scores, -jnp.inf)

  batch, _, heads, dim = index_q.shape
  return chunking.map_query_chunks(
    score,
    (index_q, index_weights, topk_indices),
    bytes_per_query=4 * batch * max(heads, dim) * topk_indices.shape[-1],
  )


def _widen(x):
  """8-bit floats as bfloat16, exactly: not every platform multiplies them."""
  return x.astype(jnp.bfloat16) if x.dtype.itemsize == 1 else x
