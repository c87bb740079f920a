# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The experts as grouped products of rows that are sorted by expert."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.expert_mlp import shared as shared_lib
from pallas_kernels.grouped import reference as grouped_reference


def expert_mlp(
  rows: Float[Array, "M E"],
  experts: Int32[Array, "M J"],
  weights: Float32[Array, "M J"],
  gate: Float[Array, "G E F"],
  up: Float[Array, "G E F"],
  down: Float[Array, "G F E"],
  shared: shared_lib.SharedExpert | None = None,
  grouped_matmul: Callable = grouped_reference.grouped_matmul,
) -> Float[Array, "M E"]:
  """See `api.expert_mlp`.

  Args:
    rows: one a token.
    experts: of each row.
    weights: of their outputs.
    gate: matrices.
    up: matrices.
    down: matrices.
    shared: the expert of all rows.
    grouped_matmul: product of sorted rows with each group's matrix.
  """
  order = jnp.argsort(experts.reshape(-1), stable=True)
  sizes = jnp.bincount(experts.reshape(-1), length=len(gate)).astype(jnp.int32)
  sorted_rows = rows[order // experts.shape[1]]
  inner = jax.nn.silu(
    grouped_matmul(sorted_rows, gate, sizes)
  ) * grouped_matmul(sorted_rows, up, sizes)
  outputs = grouped_matmul(inner, down, sizes)[jnp.argsort(order)]
  routed = weighted_sum(outputs.reshape(*experts.shape, -1), weights)
  return routed if shared is None else routed + shared_lib.output(rows, shared)


def weighted_sum(
  outputs: Float[Array, "M J E"], weights: Float32[Array, "M J"]
) -> Float[Array, "M E"]:
  """Adds each row's outputs in float32."""
  weighted = outputs.astype(jnp.float32) * weights[..., None]
  return weighted.sum(axis=1).astype(outputs.dtype)
