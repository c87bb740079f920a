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
  "glm_5_4k": Shape(8 * 4096, 256, 6144, 2048),
}
