# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The ops over all keys in float64, on the device: masks instead of gathers.

Written apart from the references of `pallas_kernels`, and differentiable.
Arguments may hold any float; results are numpy's, in float64.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def _in_float64(function: Callable) -> Callable:
  """Compiles a function whose float arguments are widened first."""

  @functools.partial(jax.jit, static_argnames=("scale", "value_dim"))
  def widened(*args, **kwargs):
    return function(*jax.tree.map(_widen, args), **kwargs)

  @functools.wraps(function)
  def call(*args, **kwargs):
    with jax.enable_x64(True):
      return jax.tree.map(np.asarray, widened(*args, **kwargs))

  return call


def _widen(x):
  return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _visible(start, end, num_keys):
  keys = jnp.arange(num_keys)
  return (keys >= start[..., None]) & (keys < end[..., None])


def _selected(indices, num_keys):
  """Which keys a query selected `[B, T, S]`; -1 is behind the last one."""
  places = jnp.where(indices >= 0, indices, num_keys)
  mask = jnp.zeros((*indices.shape[:2], num_keys + 1), bool)
  mask = jnp.put_along_axis(mask, places, True, axis=-1, inplace=False)
  return mask[..., :num_keys]


def _at(x, indices, nothing):
  """`x[..., indices]` of its last axis, and `nothing` at -1."""
  found = jnp.take_along_axis(x, jnp.maximum(indices, 0), axis=-1)
  return jnp.where(indices >= 0, found, nothing)


def _scores(index_q, index_k, weights):
  products = jnp.einsum("btid,bsd->btis", index_q, index_k)
  products = jnp.where(products > 0, products, 0)
  return jnp.einsum("bti,btis->bts", weights, products)


@_in_float64
def indexer_scores(index_q, index_k, weights, start, end, key_scale):
  """Scores, and what they would be if all their terms had one sign."""
  mask = _visible(start, end, index_k.shape[1])
  return tuple(
    jnp.where(mask, _scores(*arrays) * key_scale[:, None], -jnp.inf)
    for arrays in (
      (index_q, index_k, weights),
      (jnp.abs(index_q), jnp.abs(index_k), jnp.abs(weights)),
    )
  )


@_in_float64
def selected_scores(index_q, index_k, weights, indices, grad):
  """Scores at the indices, and gradients of the first three arguments."""

  def scores(*arrays):
    return _at(_scores(*arrays), indices, 0)

  out, vjp = jax.vjp(scores, index_q, index_k, weights)
  return jnp.where(indices >= 0, out, -jnp.inf), vjp(grad)


def _attention(query, latent, mask, scale, value_dim):
  """Output, log-sum-exp, and probabilities of each head `[B, T, N, S]`."""
  mask = mask[:, :, None]
  logits = jnp.einsum("btnc,bsc->btns", query, latent) * scale
  logits = jnp.where(mask, logits, -1e300)
  log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
  probs = jnp.where(mask, jnp.exp(logits - log_sum_exp[..., None]), 0)
  out = jnp.einsum("btns,bsv->btnv", probs, latent[..., :value_dim])
  sees_some = jnp.any(mask, axis=-1)
  return out, jnp.where(sees_some, log_sum_exp, -jnp.inf), probs


@_in_float64
def sparse_mla(query, latent, indices, *, scale, value_dim):
  """Output, log-sum-exp and mean probabilities, as the op returns them."""
  mask = _selected(indices, latent.shape[1])
  out, log_sum_exp, probs = _attention(query, latent, mask, scale, value_dim)
  return out, log_sum_exp, _at(jnp.mean(probs, axis=2), indices, 0)


@_in_float64
def sparse_mla_gradients(query, latent, indices, grad_out, grad_lse, *, scale):
  """Gradients of query and latent."""
  mask = _selected(indices, latent.shape[1])

  def attend(query, latent):
    return _attention(query, latent, mask, scale, grad_out.shape[-1])[:2]

  _, vjp = jax.vjp(attend, query, latent)
  return vjp((grad_out, grad_lse))


@_in_float64
def dense_mla_residuals(query, latent, start, end, *, scale):
  """Log-sum-exp and mean probabilities, as the op returns them."""
  mask = _visible(start, end, latent.shape[1])
  _, log_sum_exp, probs = _attention(query, latent, mask, scale, 1)
  return log_sum_exp, jnp.mean(probs, axis=2)


@_in_float64
def grouped_matmul(rows, matrices, sizes, grad):
  """Products, and gradients of rows and matrices."""
  group = jnp.searchsorted(
    jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right"
  )
  is_own = group[:, None] == jnp.arange(sizes.shape[0])

  def multiply(rows, matrices):
    products = jnp.einsum("me,gef->mgf", rows, matrices)
    return jnp.einsum("mg,mgf->mf", is_own.astype(rows.dtype), products)

  out, vjp = jax.vjp(multiply, rows, matrices)
  return out, vjp(grad)
