# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernel of the indexer's scores: one block of queries and of keys."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import numerics

_LANES = 128
# By the schedules, a product of 8 rows takes twice the cycles that it needs.
# Least rows of a product: queries times heads.
_PRODUCT_ROWS = 128


def score_block(
  first_ref, last_ref, q_ref, k_ref, weights_ref, start_ref, end_ref, out_ref,
  spread_ref, *, tiles, fold, skip
):  # fmt: skip
  """One block of queries against one block of keys."""
  b, i, j = (pl.program_id(axis) for axis in range(3))
  is_seen = j >= 0
  if skip:
    is_seen = (first_ref[b, i] <= j) & (j < last_ref[b, i])

  @pl.when(j == 0)
  def _():
    _spread_weights(weights_ref, spread_ref)

  @pl.when(is_seen)
  def _():
    for begin in range(0, tiles.keys, tiles.columns):
      columns = pl.ds(begin, tiles.columns)
      scores = _score(q_ref, k_ref[0, columns, :], spread_ref)
      key = j * tiles.keys + begin
      key = key + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
      # Selected, not multiplied: an unseen key may hold NaN.
      is_visible = (key >= start_ref[0]) & (key < end_ref[0])
      if fold > 1:
        scores = jnp.sum(scores, axis=0, keepdims=True)
        is_visible = is_visible[:1]
      out_ref[0, :, columns] = jnp.where(is_visible, scores, -jnp.inf)

  @pl.when(jnp.logical_not(is_seen))
  def _():
    out_ref[...] = jnp.full(out_ref.shape, -jnp.inf, jnp.float32)


def _spread_weights(weights_ref, spread_ref):
  """Copies each weight to all lanes, once for all blocks of keys."""
  for head in range(spread_ref.shape[0]):
    column = weights_ref[0, :, pl.ds(head, 1)]
    spread_ref[head] = jnp.broadcast_to(column, spread_ref.shape[1:])


def _score(q_ref, keys, spread_ref):
  """Sum over heads of the weighted ReLU of products, in registers."""
  _, _, heads, queries, dim = q_ref.shape
  columns = keys.shape[0]
  # The keys enter the matrix unit anew for each product, so one of few
  # queries takes several heads.
  together = math.gcd(heads, max(1, _PRODUCT_ROWS // queries))

  def add_heads(step, scores):
    group = pl.ds(step * together, together)
    products = jax.lax.dot_general(
      q_ref[0, 0, group].reshape(together * queries, dim),
      keys,
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
      precision=numerics.precision(keys.dtype),
    )
    for n in range(together):
      weights = spread_ref[step * together + n]
      weights = jnp.concatenate([weights] * (columns // _LANES), axis=1)
      of_head = products[n * queries : (n + 1) * queries]
      scores = scores + weights * jnp.maximum(of_head, 0)
    return scores

  zero = jnp.zeros((queries, columns), jnp.float32)
  return jax.lax.fori_loop(0, heads // together, add_heads, zero, unroll=True)
