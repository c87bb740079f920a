# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The gather of selected rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def gather_rows(
  table: Float[Array, "B S E"], indices: Int32[Array, "B T K"]
) -> Float[Array, "B T K E"]:
  """Rows of `table`; zeros where the index is -1, whatever row 0 holds."""
  rows = jax.vmap(lambda rows, i: rows.at[i].get(mode="clip"))(table, indices)
  return jnp.where(indices[..., None] >= 0, rows, 0)
