# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Indexers of real models, at real numbers of queries and keys."""

from typing import NamedTuple


class Shape(NamedTuple):
  """One call of `indexer_topk`."""

  batch: int
  num_queries: int
  num_keys: int
  heads: int
  dim: int
  k: int


# Heads, dim and k from the models' config.json.
SHAPES = {
  "deepseek_v32_prefill_32k": Shape(1, 4096, 32768, 64, 128, 2048),
  "deepseek_v32_prefill_128k": Shape(1, 4096, 131072, 64, 128, 2048),
  "glm_5_prefill_32k": Shape(1, 4096, 32768, 32, 128, 2048),
  "glm_5_prefill_128k": Shape(1, 4096, 131072, 32, 128, 2048),
  "glm_5_decode_128k": Shape(8, 1, 131072, 32, 128, 2048),
  "glm_5_decode_1m": Shape(1, 1, 1048576, 32, 128, 2048),
  "tiny": Shape(2, 13, 40, 16, 16, 8),
}
