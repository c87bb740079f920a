# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The one linear layer of the model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from indexcache_jax import config as config_lib
from pallas_kernels import numerics

# Rows of a padded product: one copy's tile on the matrix units.
_FEWEST_ROWS = 8


def dense(
  config: config_lib.SparseTransformerConfig,
  features: int,
  name: str,
  *,
  use_bias: bool = False,
  dtype: Any = None,
) -> nn.Dense:
  """Returns a linear layer of the model, `kernel` of shape [in, out]."""
  dtype = config.dtype if dtype is None else dtype
  return nn.Dense(
    features,
    use_bias=use_bias,
    name=name,
    dtype=dtype,
    param_dtype=config.param_dtype,
    precision=numerics.precision(dtype),
    kernel_init=nn.initializers.normal(config.initializer_range),
    dot_general=_dot_general,
  )


def _dot_general(rows, kernel, dimension_numbers, **kwargs):
  """`lax.dot_general`; on a GPU, one row is padded to several.

  XLA turns the product of a single row into an elementwise product with the
  kernel, which it writes to memory, and a sum: three times the kernel's bytes,
  and no merging of products that share their rows. That is a decode step.
  """

  def plain(rows, kernel):
    return jax.lax.dot_general(rows, kernel, dimension_numbers, **kwargs)

  def padded(rows, kernel):
    several = jnp.pad(rows.reshape(1, -1), ((0, _FEWEST_ROWS - 1), (0, 0)))
    out = jax.lax.dot_general(
      several, kernel, (((1,), (0,)), ((), ())), **kwargs
    )
    return out[:1].reshape(*rows.shape[:-1], -1)

  if rows.size != rows.shape[-1]:
    return plain(rows, kernel)
  return jax.lax.platform_dependent(rows, kernel, cuda=padded, default=plain)
