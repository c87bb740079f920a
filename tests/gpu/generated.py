# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows and queries that each have bounds, lengths and holes of their own.

A case is one of them. They share a shape, so that one compilation serves
hundreds of cases.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from tests.kernels import topk_rows

# Rows of each cache that no query selects.
UNSELECTED = 3


@functools.cache
def jitted(name: str, implementation: str, **kwargs) -> Callable:
  """An op of `pallas_kernels`, compiled once a shape."""
  op = getattr(pallas_kernels, name)
  return jax.jit(
    lambda *args, **arrays: op(
      *args, **arrays, **kwargs, implementation=implementation
    )
  )


def normal(rng: np.random.Generator, *shape: int, dtype=jnp.bfloat16):
  """Normal values of order one."""
  return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def bounds(rng: np.random.Generator, batch: int, queries: int, num_keys: int):
  """First and last visible key of each query, as many kinds as there are.

  Returns:
    Start and end `[batch, queries]`, of every kind: causal, a segment, any two
    numbers (also a start behind the end), one key, none, all.
  """
  shape = (batch, queries)
  place = np.arange(queries) + num_keys - queries
  place = np.broadcast_to(np.clip(place, 0, num_keys - 1), shape)
  any_key = rng.integers(0, num_keys, shape)
  zero = np.zeros(shape, np.int64)
  kinds = (
    (zero, place + 1),
    (place // 300 * 300, place + 1),
    (any_key, rng.integers(0, num_keys + 1, shape)),
    (any_key, any_key + 1),
    (any_key, any_key),
    (zero, zero + num_keys),
  )
  kind = rng.integers(0, len(kinds), shape)
  return tuple(
    jnp.asarray(np.choose(kind, sides), jnp.int32)
    for sides in zip(*kinds, strict=True)
  )


def selections(
  rng: np.random.Generator, batch: int, queries: int, num_keys: int, k: int
):
  """Indices `[batch, queries, k]`, -1 for none, each at most once a query.

  Of every kind: in order and in none, all places, the first few, with holes,
  one, none. Nobody selects the first `UNSELECTED` rows.
  """
  shape = (batch, queries, k)
  free = num_keys - UNSELECTED
  if free > 16 * k:
    # One of each of k equal ranges.
    stride = free // k
    indices = stride * np.arange(k) + rng.integers(0, stride, shape)
    indices = rng.permuted(indices, axis=-1)
  else:
    indices = rng.random((batch, queries, max(free, k)), np.float32)
    indices = indices.argsort(axis=-1)[..., :k]
  indices = indices + UNSELECTED
  is_sorted = rng.random((batch, queries, 1)) < 0.5
  indices = np.where(is_sorted, np.sort(indices, axis=-1), indices)
  place = np.arange(k)
  kinds = (
    np.ones(shape, bool),
    place < rng.integers(0, k + 1, (batch, queries, 1)),
    rng.random(shape) > 0.2,
    place == rng.integers(0, k, (batch, queries, 1)),
    np.zeros(shape, bool),
  )
  kind = rng.choice(
    len(kinds), (batch, queries, 1), p=(0.3, 0.2, 0.3, 0.1, 0.1)
  )
  is_selected = np.choose(kind, kinds) & (indices < num_keys)
  return jnp.asarray(np.where(is_selected, indices, -1), jnp.int32)


def poisoned(latent):
  """The cache with NaN where `selections` has no index."""
  return latent.at[:, :UNSELECTED].set(jnp.nan)


def rows(rng: np.random.Generator, num_rows: int, num_keys: int, first: int):
  """Scores whose rows are of `topk_rows.KINDS` in turn, from `first` on."""
  scores = np.empty((num_rows, num_keys), np.float32)
  kind = (first + np.arange(num_rows)) % len(topk_rows.KINDS)
  for number in np.unique(kind):
    places = np.flatnonzero(kind == number)
    scores[places] = topk_rows.draw(
      topk_rows.KINDS[number],
      (len(places), num_keys),
      seed=int(rng.integers(1 << 30)),
    )
  return scores


def lengths(rng: np.random.Generator, num_rows: int, num_keys: int, k: int):
  """Any, and every third next to k or the ends."""
  ends = np.clip([0, 1, k - 1, k, k + 1, num_keys - 1], 0, num_keys)
  drawn = rng.integers(0, num_keys + 1, num_rows)
  is_end = rng.random(num_rows) < 1 / 3
  return np.where(is_end, rng.choice(ends, num_rows), drawn).astype(np.int32)


def wrong_selections(
  scores: np.ndarray, lengths: np.ndarray | None, k: int, actual: np.ndarray
) -> list[int]:
  """Rows whose selection is not that of `top_k`, by its definition.

  Args:
    scores: `[rows, keys]`.
    lengths: scores of each row that count; None: all.
    k: indices wanted a row.
    actual: `[rows, k]`, what was selected.
  """
  num_rows, num_keys = scores.shape
  is_candidate = scores > -np.inf
  if lengths is not None:
    is_candidate &= np.arange(num_keys) < lengths[:, None]
  count = np.minimum(is_candidate.sum(axis=1), k)
  is_index = np.arange(k) < count[:, None]
  right = np.all(np.where(is_index, actual >= 0, actual == -1), axis=1)
  right &= np.all(actual < num_keys, axis=1)
  right &= np.all((np.diff(actual, axis=1) > 0) | ~is_index[:, 1:], axis=1)
  # -1 and what is out of bounds in a column of its own.
  places = np.where((actual < 0) | (actual >= num_keys), num_keys, actual)
  chosen = np.zeros((num_rows, num_keys + 1), bool)
  np.put_along_axis(chosen, places, True, axis=1)
  chosen = chosen[:, :num_keys]
  right &= np.all(is_candidate | ~chosen, axis=1)
  least = np.min(scores, axis=1, where=chosen, initial=np.inf)
  is_left = is_candidate & ~chosen
  right &= np.max(scores, axis=1, where=is_left, initial=-np.inf) <= least
  # Of equal scores, those behind are left.
  is_least = scores == least[:, None]
  columns = np.arange(num_keys)
  last = np.max(np.where(chosen & is_least, columns, -1), axis=1, initial=-1)
  right &= np.all(~(is_left & is_least) | (columns > last[:, None]), axis=1)
  return np.flatnonzero(~right).tolist()
