# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The ops as float64 loops: the bottom of the ladder of proof."""

import numpy as np


def select(scores, k):
  """Ascending indices of the k largest; ties to the lower, -1 behind."""
  keys = [s for s, x in enumerate(scores) if not np.isnan(x) and x > -np.inf]
  keys.sort(key=lambda s: (-scores[s], s))
  chosen = sorted(keys[:k])
  return np.array(chosen + [-1] * (k - len(chosen)), np.int32)


def indexer_scores(index_q, index_k, index_weights, key_start, key_end):
  q, k, w = (
    np.asarray(x, np.float64) for x in (index_q, index_k, index_weights)
  )
  batch, queries = q.shape[:2]
  scores = np.full((batch, queries, k.shape[1]), -np.inf)
  for b in range(batch):
    for t in range(queries):
      for s in range(int(key_start[b, t]), int(key_end[b, t])):
        products = np.maximum(q[b, t] @ k[b, s], 0)
        scores[b, t, s] = np.sum(w[b, t] * products)
  return scores


def sparse_mla(query, kv_latent, topk_indices, scale, value_dim):
  """Output, log-sum-exp and head-averaged probabilities."""
  query, kv_latent = (np.asarray(x, np.float64) for x in (query, kv_latent))
  indices = np.asarray(topk_indices)
  batch, queries, heads = query.shape[:3]
  out = np.zeros((batch, queries, heads, value_dim))
  log_sum_exp = np.full((batch, queries, heads), -np.inf)
  mean_probs = np.zeros(indices.shape)
  for b in range(batch):
    for t in range(queries):
      places = np.flatnonzero(indices[b, t] >= 0)
      if not len(places):
        continue
      rows = kv_latent[b, indices[b, t, places]]
      for n in range(heads):
        logits = scale * (rows @ query[b, t, n])
        top = logits.max()
        probs = np.exp(logits - top)
        log_sum_exp[b, t, n] = top + np.log(probs.sum())
        probs /= probs.sum()
        out[b, t, n] = probs @ rows[:, :value_dim]
        mean_probs[b, t, places] += probs / heads
  return out, log_sum_exp, mean_probs
