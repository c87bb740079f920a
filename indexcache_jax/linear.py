# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The one linear layer of the model."""

from typing import Any

import flax.linen as nn

from indexcache_jax import config as config_lib
from pallas_kernels import numerics


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
  )
