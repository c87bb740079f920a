# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The precision rule of every matrix product."""

import jax
import jax.numpy as jnp


def precision(dtype) -> jax.lax.Precision | None:
  """Matrix precision for `dtype`: float32 means float32.

  TPUs and GPUs multiply float32 in bfloat16 or TF32 passes by default, which
  moves the boundary of a top-k selection.
  """
  is_float32 = jnp.dtype(dtype) == jnp.float32
  return jax.lax.Precision.HIGHEST if is_float32 else None
