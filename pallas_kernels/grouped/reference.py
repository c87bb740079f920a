# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The grouped product as XLA has it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import numerics


def grouped_matmul(
  rows: Float[Array, "M E"],
  matrices: Float[Array, "G E F"],
  group_sizes: Int32[Array, " G"],
) -> Float[Array, "M F"]:
  """`jax.lax.ragged_dot`, summed in float32."""
  return jax.lax.ragged_dot(
    rows,
    matrices,
    group_sizes,
    precision=numerics.precision(rows.dtype),
    preferred_element_type=jnp.float32,
  ).astype(rows.dtype)
