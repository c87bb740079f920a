# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of selected keys on Hopper: limits, padding and gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.hopper import chip, row_sums
from pallas_kernels.indexer import mosaic_gpu_selected_kernel as kernel

_MAX_HEADS = kernel.TILE
_MAX_DIM = 128


def selected_indexer_scores(
  index_q: Float[Array, "B T I D"],
  index_k: Float[Array, "B S D"],
  index_weights: Float32[Array, "B T I"],
  topk_indices: Int32[Array, "B T K"],
) -> Float32[Array, "B T K"]:
  """Scores of the selected keys, one row copy each; and gradients likewise.

  The gradients are the same in every run. That of the keys is a sum in float32
  of terms that are rounded to bfloat16, B x S x D floats of memory and
  `row_sums.CHUNK_BYTES` for a chunk of queries' terms.

  Raises:
    NotImplementedError: a chip, dtype or shape that the kernel can't run.
  """
  _check(index_q, index_k)
  heads = index_q.shape[2]
  added_heads = (0, -heads % 8)
  index_q = jnp.pad(index_q, ((0, 0), (0, 0), added_heads, (0, 0)))
  index_weights = jnp.pad(
    index_weights.astype(jnp.float32),
    ((0, 0), (0, 0), (0, kernel.TILE - heads)),
  )
  count = topk_indices.shape[-1]
  indices = jnp.pad(
    topk_indices,
    ((0, 0), (0, 0), (0, -count % kernel.TILE)),
    constant_values=-1,
  )
  scores = _scores(index_q, index_k, index_weights, indices)[..., :count]
  return jnp.where(topk_indices >= 0, scores, -jnp.inf)


def _check(index_q, index_k):
  chip.chip()
  if index_q.dtype != index_k.dtype or index_k.dtype != jnp.bfloat16:
    raise NotImplementedError(
      "needs queries and keys in bfloat16: got"
      f" {index_q.dtype} and {index_k.dtype}"
    )
  batch, num_keys, dim = index_k.shape
  heads = index_q.shape[2]
  if dim % kernel.TILE or dim > _MAX_DIM:
    raise NotImplementedError(
      f"needs a head dim of {kernel.TILE} or {_MAX_DIM}: got {dim}"
    )
  if heads > _MAX_HEADS:
    raise NotImplementedError(f"needs at most {_MAX_HEADS} heads: got {heads}")
  if batch * num_keys >= 1 << 31:
    raise NotImplementedError(f"counts keys in int32: got {batch} x {num_keys}")


@jax.custom_vjp
def _scores(index_q, index_k, index_weights, indices):
  problem = _problem(index_q, index_k, indices)
  scores = kernel.scores(
    problem, *_flat(index_q, index_k, index_weights, indices)
  )
  return scores.reshape(indices.shape)


def _forward(*args):
  return _scores(*args), args


def _backward(args, grad):
  index_q, index_k, index_weights, indices = args
  problem = _problem(index_q, index_k, indices)
  # The score of index -1 is not a sum of its key's products.
  grad = jnp.where(indices >= 0, grad, 0.0).reshape(-1, grad.shape[-1])
  flat = _flat(*args)
  grad_q, grad_weights = (
    jax.new_ref(jax.lax.empty(flat[i].shape, flat[i].dtype)) for i in (0, 2)
  )
  grad_k = row_sums.sums(
    problem.sizes,
    lambda bounds, bits: kernel.gradients(
      problem, bounds, *flat, grad, grad_q, grad_weights, bits
    ),
  )
  return (
    grad_q[...].reshape(index_q.shape),
    grad_k.reshape(index_k.shape).astype(index_k.dtype),
    grad_weights[...].reshape(index_weights.shape),
    None,
  )


_scores.defvjp(_forward, _backward)


def _problem(index_q, index_k, indices):
  batch, num_queries, heads, dim = index_q.shape
  sizes = row_sums.Sizes(
    sequences=batch,
    items=num_queries,
    num_keys=index_k.shape[1],
    rows_an_item=indices.shape[-1],
    width=dim,
    num_blocks=chip.chip().num_multiprocessors * kernel.PAIRS,
  )
  return kernel.Problem(sizes=sizes, heads=heads)


def _flat(index_q, index_k, index_weights, indices):
  """Joins the sequences."""
  return (
    index_q.reshape(-1, *index_q.shape[2:]),
    index_k.reshape(-1, index_k.shape[-1]),
    index_weights.reshape(-1, kernel.TILE),
    indices.reshape(-1, indices.shape[-1]),
  )
