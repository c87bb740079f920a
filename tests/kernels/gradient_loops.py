# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of the gathering ops as float64 loops over queries.

No query has an index twice.
"""

import numpy as np


def sparse_mla(query, kv_latent, indices, grad_out, grad_lse, scale):
  """Gradients of query and latent; `grad_lse` of the log-sum-exp."""
  query, kv_latent, grad_out, grad_lse = (
    np.asarray(x, np.float64) for x in (query, kv_latent, grad_out, grad_lse)
  )
  indices = np.asarray(indices)
  value_dim = grad_out.shape[-1]
  grad_query, grad_latent = np.zeros_like(query), np.zeros(kv_latent.shape)
  for b, t in np.ndindex(indices.shape[:2]):
    chosen = indices[b, t][indices[b, t] >= 0]
    if not len(chosen):
      continue
    rows = kv_latent[b, chosen]
    logits = scale * query[b, t] @ rows.T
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    grad_probs = grad_out[b, t] @ rows[:, :value_dim].T
    mean = np.sum(probs * grad_probs, axis=1, keepdims=True)
    grad_logits = probs * (grad_probs - mean + grad_lse[b, t][:, None])
    grad_query[b, t] = scale * grad_logits @ rows
    grad_latent[b, chosen] += scale * grad_logits.T @ query[b, t]
    grad_latent[b, chosen, :value_dim] += probs.T @ grad_out[b, t]
  return grad_query, grad_latent


def selected_scores(index_q, index_k, weights, indices, grad):
  """Scores, and gradients of the first three arguments."""
  index_q, index_k, weights, grad = (
    np.asarray(x, np.float64) for x in (index_q, index_k, weights, grad)
  )
  indices = np.asarray(indices)
  scores = np.full(indices.shape, -np.inf)
  grads = (
    np.zeros_like(index_q),
    np.zeros(index_k.shape),
    np.zeros_like(weights),
  )
  for b, t in np.ndindex(indices.shape[:2]):
    places = np.flatnonzero(indices[b, t] >= 0)
    chosen = indices[b, t, places]
    keys = index_k[b, chosen]
    products = index_q[b, t] @ keys.T
    scores[b, t, places] = weights[b, t] @ np.maximum(products, 0)
    slopes = (products > 0) * grad[b, t, places]
    grads[2][b, t] = np.sum(slopes * products, axis=1)
    slopes = slopes * weights[b, t][:, None]
    grads[0][b, t] = slopes @ keys
    grads[1][b, chosen] += slopes.T @ index_q[b, t]
  return scores, grads


def relative_error(actual, expected):
  """Of two arrays of gradients, in the Frobenius norm."""
  expected = np.asarray(expected, np.float64)
  gap = np.asarray(actual, np.float64) - expected
  return np.linalg.norm(gap) / max(np.linalg.norm(expected), 1e-30)
