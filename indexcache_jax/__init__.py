# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse attention with cross-layer index reuse, in JAX."""

from indexcache_jax.cache import Cache, init_cache
from indexcache_jax.checkpoints import (
  CheckpointError,
  load_checkpoint,
  load_config,
  save_checkpoint,
)
from indexcache_jax.config import RopeConfig, SparseTransformerConfig
from indexcache_jax.distillation import distillation_loss
from indexcache_jax.embedded import embedded_checkpoint
from indexcache_jax.generation import generate, prefill
from indexcache_jax.layerwise import LayerwiseLoss, next_token_losses
from indexcache_jax.methods import METHODS
from indexcache_jax.model import Aux, SparseTransformer
from indexcache_jax.presets import PRESETS
from indexcache_jax.schedule import ReuseSchedule
from indexcache_jax.search import SearchResult, greedy_search
from indexcache_jax.search_state import SearchState

__all__ = [
  "METHODS",
  "PRESETS",
  "Aux",
  "Cache",
  "CheckpointError",
  "LayerwiseLoss",
  "ReuseSchedule",
  "RopeConfig",
  "SearchResult",
  "SearchState",
  "SparseTransformer",
  "SparseTransformerConfig",
  "distillation_loss",
  "embedded_checkpoint",
  "generate",
  "greedy_search",
  "init_cache",
  "load_checkpoint",
  "load_config",
  "next_token_losses",
  "prefill",
  "save_checkpoint",
]
