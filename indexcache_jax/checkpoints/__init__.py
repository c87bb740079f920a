# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints: reading them without trust, writing them whole."""

from indexcache_jax.checkpoints.errors import CheckpointError
from indexcache_jax.checkpoints.loading import load_checkpoint, load_config
from indexcache_jax.checkpoints.saving import save_checkpoint

__all__ = [
  "CheckpointError",
  "load_checkpoint",
  "load_config",
  "save_checkpoint",
]
