# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares us with what `oracle.py` left in a folder; project environment."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import indexcache_jax as ic

# Of the largest logit, in float32.
LOGIT_TOLERANCE = 1e-4
# Each model runs once: compiling takes the time, not running.
_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Outputs:
  """One forward pass, ours or the oracle's.

  Attributes:
    logits: float32 [B, T, V].
    topk_indices: int32 [L, B, T, K], visible keys ascending, then -1.
  """

  logits: np.ndarray
  topk_indices: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How far two passes are apart.

  Attributes:
    logit_error: largest difference over the largest expected logit.
    num_wrong_rows: rows [layer, sequence, query] whose selections differ.
    num_rows: all rows.
  """

  logit_error: float
  num_wrong_rows: int
  num_rows: int

  @property
  def is_equal(self) -> bool:
    """Logits within the tolerance, selections the same sets."""
    # Written so that a NaN is no equality.
    return self.logit_error <= LOGIT_TOLERANCE and self.num_wrong_rows == 0

  def __str__(self) -> str:
    return (
      f"logits {self.logit_error:.1e} of the largest (limit"
      f" {LOGIT_TOLERANCE:.0e}), selections of"
      f" {self.num_wrong_rows}/{self.num_rows} rows differ"
    )


def load_tokens(folder: pathlib.Path) -> np.ndarray:
  """Returns the tokens [B, T] that the oracle ran on."""
  with np.load(folder / "oracle.npz") as arrays:
    return arrays["tokens"]


def load_lengths(folder: pathlib.Path) -> list[int]:
  """Returns the context lengths that the oracle ran, ascending."""
  with np.load(folder / "oracle.npz") as arrays:
    return sorted(
      int(name.removeprefix("logits_"))
      for name in arrays.files
      if name.startswith("logits_")
    )


def load_expected(folder: pathlib.Path, length: int) -> Outputs:
  """Returns the oracle's pass over the first `length` tokens."""
  with np.load(folder / "oracle.npz") as arrays:
    return Outputs(arrays[f"logits_{length}"], arrays[f"topk_{length}"])


def run(config, params, tokens: np.ndarray) -> Outputs:
  """Returns our pass over `tokens` [B, T].

  Compiles at every call: a test that patches the model must not meet what was
  compiled before the patch.
  """

  @functools.partial(jax.jit, compiler_options=_COMPILER_OPTIONS)
  def forward(params, tokens):
    logits, aux = ic.SparseTransformer(config).apply({"params": params}, tokens)
    return logits, jnp.stack(aux.topk_indices)

  logits, topk_indices = forward(params, jnp.asarray(tokens))
  return Outputs(np.asarray(logits), np.asarray(topk_indices))


def compare(actual: Outputs, expected: Outputs) -> Comparison:
  """Returns the distance of `actual` from `expected`."""
  if actual.logits.shape != expected.logits.shape:
    raise ValueError(
      "`actual` and `expected` must be passes over the same tokens: got"
      f" logits of shape {actual.logits.shape} and {expected.logits.shape}."
    )
  width = max(outputs.topk_indices.shape[-1] for outputs in (actual, expected))
  is_wrong = np.any(
    _sets(actual.topk_indices, width) != _sets(expected.topk_indices, width),
    axis=-1,
  )
  difference = np.max(np.abs(actual.logits - expected.logits))
  return Comparison(
    logit_error=float(difference / np.max(np.abs(expected.logits))),
    num_wrong_rows=int(is_wrong.sum()),
    num_rows=is_wrong.size,
  )


def _sets(topk_indices, width):
  """Rows as sets: sorted, and -1 up to `width`, whatever their order was."""
  missing = width - topk_indices.shape[-1]
  padded = np.pad(
    topk_indices, [(0, 0)] * 3 + [(0, missing)], constant_values=-1
  )
  return np.sort(padded, axis=-1)
