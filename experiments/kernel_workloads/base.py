# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a workload is, and what several of them draw and check with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Queries, or rows, that a check compares with the reference.
CHECKED = 8
# Of attention's logits.
SCALE = 192**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """One call of one op.

  Attributes:
    op: the public function, with "_backward" for its gradient.
    name: model or heads, phase, keys, dtype.
    make: from a key to the arguments.
    function: of the arguments.
    error: of arguments and result; must not exceed `tolerance`.
    tolerance: of a relative error; 0 where the result is exact.
    work: floating-point operations, or bytes, that the call needs.
    unit: "TFLOP/s" or "TB/s".
    ceiling: "bfloat16", "float8_e4m3fn" (a matrix product) or "copy".
  """

  op: str
  name: str
  make: Callable[[jax.Array], tuple[Any, ...]]
  function: Callable
  error: Callable[[tuple[Any, ...], Any], float]
  tolerance: float
  work: float
  unit: str
  ceiling: str


def normal(key, shape, dtype=jnp.bfloat16):
  """Normal numbers of a shape."""
  # Jitted, lest a float32 copy of the largest arrays is made.
  return jax.jit(
    lambda key: jax.random.normal(key, shape, jnp.float32).astype(dtype)
  )(key)


def relative_error(actual, expected):
  """Of the norms, in float32."""
  return float(_relative_error(actual, expected))


# On the device, and fused: the gradient of a million rows is 2.4 GB.
@jax.jit
def _relative_error(actual, expected):
  actual, expected = (x.astype(jnp.float32) for x in (actual, expected))
  return jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)


def causal_bounds(num_queries, num_keys, batch=1):
  """The queries are the last tokens; each sees itself and all before."""
  end = num_keys - num_queries + 1 + jnp.arange(num_queries, dtype=jnp.int32)
  end = jnp.broadcast_to(end, (batch, num_queries))
  return jnp.zeros_like(end), end


def causal_pairs(num_queries, num_keys):
  """Pairs of a query and a key that it sees, for the last queries."""
  return num_queries * (num_keys - (num_queries - 1) / 2)


def selection(key, batch, num_queries, num_keys, k):
  """One random row of each of k equal ranges: ascending, as `top_k` has it."""
  stride = num_keys // k
  offset = jax.random.randint(key, (batch, num_queries, k), 0, stride)
  return (stride * jnp.arange(k) + offset).astype(jnp.int32)


def pull_back(form, *args):
  """Result and pull-back of `form` at `args`, which a jitted call can take."""
  return jax.jit(lambda *args: jax.vjp(form, *args))(*args)
