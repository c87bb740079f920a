# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Expert products of real models."""

from typing import NamedTuple


class Shape(NamedTuple):
  """One of an expert MLP's three products: rows are tokens x experts each."""

  rows: int
  groups: int
  width: int
  out_width: int


# Widths and experts from the models' config.json.
SHAPES = {
  "glm_47_flash_4k": Shape(4 * 4096, 64, 2048, 1536),
  "glm_5_4k": Shape(8 * 4096, 256, 6144, 2048),
  "tiny": Shape(37, 8, 32, 16),
}
