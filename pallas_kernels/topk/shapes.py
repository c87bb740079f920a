# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows of scores that real models select from."""

from typing import NamedTuple


class Shape(NamedTuple):
  """One call: rows of S scores, k of each."""

  rows: int
  num_keys: int
  k: int


# index_topk is 2048 in DeepSeek-V3.2 and all of GLM-5 (their config.json).
SHAPES = {
  "prefill_32k": Shape(4096, 32768, 2048),
  "prefill_128k": Shape(1024, 131072, 2048),
  "decode_128k": Shape(64, 131072, 2048),
  "decode_1m": Shape(1, 1048576, 2048),
  "tiny": Shape(6, 40, 8),
}
