# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Chunks of the warm-up's queries in real models."""

from typing import NamedTuple


class Shape(NamedTuple):
  """One call of `dense_mla_residuals`."""

  batch: int
  num_queries: int
  num_keys: int
  heads: int
  latent_dim: int


# Heads and widths from the models' config.json; 20 heads: GLM-4.7-Flash.
SHAPES = {
  "deepseek_v32_32k": Shape(1, 512, 32768, 128, 576),
  "glm_5_32k": Shape(1, 512, 32768, 64, 576),
  "glm_5_128k": Shape(1, 256, 131072, 64, 576),
  "glm_47_flash_32k": Shape(1, 512, 32768, 20, 576),
  "tiny": Shape(2, 13, 40, 2, 24),
}
