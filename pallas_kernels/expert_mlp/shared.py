# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The expert that every row goes through, beside those that it chose."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import numerics


class SharedExpert(NamedTuple):
  """Matrices of n shared experts, which act as one of n widths.

  Attributes:
    gate: of the routed experts' dtype.
    up: likewise.
    down: likewise.
  """

  gate: Float[Array, "E nF"]
  up: Float[Array, "E nF"]
  down: Float[Array, "nF E"]


def output(
  rows: Float[Array, "M E"], shared: SharedExpert
) -> Float[Array, "M E"]:
  """Returns `down(silu(gate(rows)) * up(rows))`, rounded to their dtype."""
  product = functools.partial(
    jnp.matmul, precision=numerics.precision(rows.dtype)
  )
  gated = jax.nn.silu(product(rows, shared.gate)) * product(rows, shared.up)
  return product(gated, shared.down)
