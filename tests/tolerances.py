# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The one table of tolerances, by dtype of the compared result."""

import math

import jax.numpy as jnp

# dtype -> (atol, rtol) for values of order one after a reduction over one
# element; float32 leaves room for another order of summation.
_TABLE = {
  "float64": (1e-12, 1e-12),
  "float32": (2e-6, 2e-6),
  "bfloat16": (1e-2, 1e-2),
  "float8_e4m3fn": (7e-2, 7e-2),
}


def tolerance(dtype, reduction: int = 1, grads: bool = False) -> dict:
  """Returns `atol` and `rtol` for a result of `dtype`.

  Args:
    dtype: of the result.
    reduction: number of summed terms; rounding errors of a sum of independent
      terms grow with its square root.
    grads: gradients pass through the reduction twice.
  """
  atol, rtol = _TABLE[jnp.dtype(dtype).name]
  factor = math.sqrt(reduction) * (2 if grads else 1)
  return {"atol": atol * factor, "rtol": rtol * factor}
