# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The committed fixtures, loaded once for all tests."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import indexcache_jax as ic
from tests.oracle import compare

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAMES = (
  "deepseek_grouped_yarn",
  "glm_52_rule",
  "glm_full",
  "glm_irregular_grouped",
  "glm_small_latents",
)
# Below, and five times, the fixtures' index_topk of 8.
SHORT, LONG = 6, 40


class Fixture(NamedTuple):
  """One folder of `tests/golden`.

  Attributes:
    config: as `load_checkpoint` reads it.
    params: likewise.
    tokens: int32 [B, T].
    expected: transformers' pass, by context length.
  """

  config: ic.SparseTransformerConfig
  params: dict[str, Any]
  tokens: np.ndarray
  expected: dict[int, compare.Outputs]


@functools.cache
def load(name: str) -> Fixture:
  """Loads a fixture; callers must not change it."""
  folder = GOLDEN / name
  config, params = ic.load_checkpoint(folder, dtype=jnp.float32)
  return Fixture(
    config,
    params,
    compare.load_tokens(folder),
    {
      length: compare.load_expected(folder, length)
      for length in compare.load_lengths(folder)
    },
  )


def compare_with_oracle(fixture: Fixture, length: int) -> compare.Comparison:
  """Runs a fixture, or a wrong variant of one, on its first tokens."""
  actual = compare.run(
    fixture.config, fixture.params, fixture.tokens[:, :length]
  )
  return compare.compare(actual, fixture.expected[length])


@functools.cache
def compare_right(name: str, length: int) -> compare.Comparison:
  """Returns the comparison of the fixture as it is."""
  return compare_with_oracle(load(name), length)
