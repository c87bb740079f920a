# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows that a top-k kernel may fail on, and what it should select."""

import numpy as np

_EPSILON = np.finfo(np.float32).eps


def _nan(rng, shape):
  """Scores with NaN of every kind and sign, and some +inf."""
  scores = rng.normal(size=shape).astype(np.float32)
  for low, share in ((0x7F800001, 0.3), (0xFF800001, 0.1)):
    bits = rng.integers(low, low + 0x7FFFFE, shape, dtype=np.uint32)
    scores = np.where(rng.random(shape) < share, bits.view(np.float32), scores)
  return np.where(rng.random(shape) < 0.01, np.inf, scores)


def _relu(rng, shape):
  """What an indexer's ReLU makes: zeros of both signs."""
  scores = rng.normal(size=shape)
  zeros = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
  return np.where(scores > 1.5, scores, zeros)


def _dense(_, shape):
  """All that matters in one stretch."""
  num_keys = shape[-1]
  scores = np.full(shape, -1.0)
  stretch = np.arange(num_keys // 5)
  scores[..., num_keys // 3 : num_keys // 3 + len(stretch)] = stretch
  return scores


def _sampled(offset, stride):
  """Rows where every `stride`-th chunk of four scores misleads."""

  def make(rng, shape):
    is_sampled = np.arange(shape[-1]) // 4 % stride == 0
    return rng.normal(size=shape) + np.where(is_sampled, offset, 0)

  return make


def _with(share, value):
  def make(rng, shape):
    scores = rng.normal(size=shape)
    return np.where(rng.random(shape) < share, value, scores)

  return make


_MAKERS = {
  "normal": _with(0, 0),
  "relu": _relu,
  "ties": _with(0.98, 0.25),
  "narrow": lambda rng, shape: 1 + rng.integers(0, 50, shape) * _EPSILON,
  "rising": lambda rng, shape: np.sort(rng.normal(size=shape)),
  "falling": lambda rng, shape: -np.sort(rng.normal(size=shape)),
  "mostly_masked": _with(0.99, -np.inf),
  "nan": _nan,
  "equal": lambda _, shape: np.full(shape, -2.5),
  "few_values": lambda rng, shape: rng.integers(0, 3, shape),
  "any_bits": lambda rng, shape: rng.integers(
    0, 2**32, shape, dtype=np.uint32
  ).view(np.float32),
  "dense": _dense,
  **{
    f"sampled_{name}_{stride}": _sampled(offset, stride)
    for name, offset in (("high", 10), ("low", -10))
    for stride in (2, 8, 11, 32)
  },
}
KINDS = tuple(_MAKERS)


def draw(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Float32 scores of one of `KINDS`."""
  scores = _MAKERS[kind](np.random.default_rng(seed), shape)
  return np.ascontiguousarray(scores, np.float32)


def select(scores: np.ndarray, k: int) -> np.ndarray:
  """`loops.select` for long rows: by a stable sort of exact float64."""
  keys = np.where(np.isnan(scores), -np.inf, scores).astype(np.float64)
  chosen = np.argsort(-keys, kind="stable")[:k]
  chosen = np.sort(chosen[keys[chosen] > -np.inf])
  return np.pad(chosen, (0, k - len(chosen)), constant_values=-1).astype(
    np.int32
  )
