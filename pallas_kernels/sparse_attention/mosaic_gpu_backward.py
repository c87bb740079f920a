# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The gradients of sparse MLA on Hopper: what surrounds the kernel."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.hopper import chip, row_sums
from pallas_kernels.sparse_attention import mosaic_gpu_backward_kernel as kernel
from pallas_kernels.sparse_attention import reference


def sparse_mla_backward(
  query: Float[Array, "B T N C"],
  kv_latent: Float[Array, "B S C"],
  indices: Int32[Array, "B T K"],
  out: Float[Array, "B T N V"],
  log_sum_exp: Float32[Array, "B T N"],
  grad_out: Float[Array, "B T N V"],
  grad_log_sum_exp: Float32[Array, "B T N"] | None,
  grad_mean_probs: Float32[Array, "B T K"] | None,
  *,
  scale: float,
  value_dim: int,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B S C"]]:
  """Gradients of the queries and of the rows.

  Args:
    query: bfloat16; N up to 128, of no multiple of 8 (above 64, of 16) padded;
      C a multiple of 64 up to 576.
    kv_latent: bfloat16.
    indices: as the forward's, -1 for none; K a multiple of 64. Of a row that a
      query has twice, one term would be lost.
    out: the forward's; zeros for a query without rows.
    log_sum_exp: the forward's, of the scaled logits; -inf without rows.
    grad_out: of `out`.
    grad_log_sum_exp: None: zeros.
    grad_mean_probs: None: zeros. If given, XLA computes everything.
    scale: factor on the logits.
    value_dim: V.

  Returns:
    In the dtypes of `query` and `kv_latent`, the same in every run: the rows'
    gradient is a sum in float32, in the order of the queries, of terms that
    are rounded to bfloat16 as the products' operands are. Memory: B x S x C
    floats, and `row_sums.CHUNK_BYTES` for a chunk of queries' terms.
  """
  if grad_mean_probs is not None:
    return _reference_backward(
      query,
      kv_latent,
      indices,
      grad_out,
      grad_log_sum_exp,
      grad_mean_probs,
      scale=scale,
      value_dim=value_dim,
    )
  batch, num_queries, heads, width = query.shape
  num_keys = kv_latent.shape[1]
  delta = jnp.sum(
    grad_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1
  )
  if grad_log_sum_exp is not None:
    # A query without rows may come with any gradient of its -inf.
    delta -= jnp.where(log_sum_exp > -jnp.inf, grad_log_sum_exp, 0.0)
  head_tiles = -(-heads // kernel.TILE)
  tile_heads = -(-heads // (8 * head_tiles)) * 8

  def by_tile(x):
    x = _pad_second(
      x.reshape(batch * num_queries, *x.shape[2:]), head_tiles * tile_heads
    )
    return x.reshape(-1, tile_heads, *x.shape[2:])

  def by_row(x):
    return _pad_second(by_tile(x), kernel.TILE)

  problem = kernel.Problem(
    sizes=row_sums.Sizes(
      sequences=batch,
      items=num_queries * head_tiles,
      num_keys=num_keys,
      rows_an_item=indices.shape[-1],
      width=width,
      num_blocks=chip.chip().num_multiprocessors,
    ),
    head_tiles=head_tiles,
    heads=tile_heads,
    value_dim=value_dim,
    scale=scale,
  )
  arguments = (
    by_tile(query),
    by_tile(grad_out),
    kv_latent.reshape(-1, width),
    indices.reshape(batch * num_queries, -1),
    by_row(log_sum_exp * math.log2(math.e)),
    by_row(delta),
  )
  grad_query = jax.new_ref(jax.lax.empty(arguments[0].shape, query.dtype))
  grad_latent = row_sums.sums(
    problem.sizes,
    lambda bounds, bits: kernel.call(
      problem, bounds, *arguments, grad_query, bits
    ),
  )
  grad_query = grad_query[...].reshape(*query.shape[:2], -1, width)
  return (
    grad_query[:, :, :heads],
    grad_latent.reshape(kv_latent.shape).astype(kv_latent.dtype),
  )


def _pad_second(x, size):
  """Zeros of query and gradient: such a head adds nothing."""
  return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def _reference_backward(
  query,
  kv_latent,
  indices,
  grad_out,
  grad_log_sum_exp,
  grad_mean_probs,
  *,
  scale,
  value_dim,
):
  """XLA's gradient, which alone has that of `mean_probs`."""
  if grad_log_sum_exp is None:
    grad_log_sum_exp = jnp.zeros(query.shape[:3], jnp.float32)
  _, vjp = jax.vjp(
    lambda query, kv_latent: reference.sparse_mla(
      query, kv_latent, indices, scale=scale, value_dim=value_dim
    ),
    query,
    kv_latent,
  )
  residuals = reference.SparseMLAResiduals(grad_log_sum_exp, grad_mean_probs)
  return vjp((grad_out, residuals))
