# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts of real models."""

from typing import NamedTuple


class Shape(NamedTuple):
  """Tokens of a call, and the experts that they go through."""

  rows: int
  experts_per_row: int
  experts: int
  width: int
  inner: int


# Widths and experts from the models' config.json.
SHAPES = {
  "glm_47_flash_decode": Shape(1, 4, 64, 2048, 1536),
  "glm_47_flash_decode_b16": Shape(16, 4, 64, 2048, 1536),
  "glm_47_flash_4k": Shape(4096, 4, 64, 2048, 1536),
  "glm_5_decode": Shape(1, 8, 256, 6144, 2048),
  "glm_5_decode_b64": Shape(64, 8, 256, 6144, 2048),
  "tiny": Shape(37, 2, 8, 32, 16),
}
