# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse attention of real models, prefill and decode."""

from typing import NamedTuple


class Shape(NamedTuple):
  """One call of `sparse_mla`."""

  batch: int
  num_queries: int
  num_keys: int
  heads: int
  latent_dim: int
  value_dim: int
  k: int


# Heads, widths and k from the models' config.json; 20 heads: GLM-4.7-Flash.
SHAPES = {
  "deepseek_v32_prefill_32k": Shape(1, 4096, 32768, 128, 576, 512, 2048),
  "glm_5_prefill_32k": Shape(1, 4096, 32768, 64, 576, 512, 2048),
  "glm_5_prefill_128k": Shape(1, 4096, 131072, 64, 576, 512, 2048),
  "glm_47_flash_prefill_128k": Shape(1, 4096, 131072, 20, 576, 512, 2048),
  "glm_5_decode_128k": Shape(8, 1, 131072, 64, 576, 512, 2048),
  "tiny": Shape(2, 13, 40, 2, 24, 16, 8),
}
