# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The one linear layer of the model."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from indexcache_jax import config as config_lib
from pallas_kernels import numerics

# Rows of a padded product: one copy's tile on the matrix units.
_FEWEST_ROWS = 8
# Of a sum over a kernel's rows.
_PARTS = 8


def dense(
  config: config_lib.SparseTransformerConfig,
  features: int,
  name: str,
  *,
  use_bias: bool = False,
) -> nn.Dense:
  """Returns a linear layer of the model, `kernel` of shape [in, out]."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    name=name,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    precision=numerics.precision(config.dtype),
    kernel_init=nn.initializers.normal(config.initializer_range),
    dot_general=_dot_general,
  )


class Float32Dense(nn.Module):
  """A linear layer without bias whose outputs are float32."""

  config: config_lib.SparseTransformerConfig
  features: int

  @nn.compact
  def __call__(self, rows: Float[Array, "*M in"]) -> Float32[Array, "*M out"]:
    """Returns `rows @ kernel` to float32's accuracy."""
    kernel = self.param(
      "kernel",
      nn.initializers.normal(self.config.initializer_range),
      (rows.shape[-1], self.features),
      self.config.param_dtype,
    )
    return float32_product(rows, kernel)


class KernelOnly(nn.Module):
  """A linear layer's kernel, for products that are not `x @ kernel`."""

  config: config_lib.SparseTransformerConfig
  shape: tuple[int, int]

  @nn.compact
  def __call__(self) -> Float[Array, "inputs outputs"]:
    """Returns the kernel in the activations' dtype."""
    cfg = self.config
    kernel = self.param(
      "kernel",
      nn.initializers.normal(cfg.initializer_range),
      self.shape,
      cfg.param_dtype,
    )
    return kernel.astype(cfg.dtype)


def float32_product(
  rows: Float[Array, "*M in"], kernel: Float[Array, "in out"]
) -> Float32[Array, "*M out"]:
  """`rows @ kernel` to float32's accuracy.

  The product of two bfloat16 numbers is one of float32, and so the matrix
  units' sums of them are float32's: no need to widen them first, which on a GPU
  costs several times the product.
  """

  def plain(rows, kernel):
    if rows.dtype == kernel.dtype == jnp.bfloat16:
      return jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
    return jnp.matmul(
      rows.astype(jnp.float32),
      kernel.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )

  def in_parts(rows, kernel):
    sums = _sums_of_products(rows.reshape(-1, 1), kernel)
    return sums.reshape(*rows.shape[:-1], -1)

  return _by_rows(rows, kernel, rows.shape[:-1], several=plain, one=in_parts)


def by_head(
  config: config_lib.SparseTransformerConfig,
  rows: Float[Array, "B T N in"],
  kernel: Float[Array, "in N out"],
) -> Float[Array, "B T N out"]:
  """The product of each head's rows with its own matrix."""

  def plain(rows, kernel):
    return jnp.einsum(
      "btnv,vnd->btnd",
      rows,
      kernel,
      precision=numerics.precision(config.dtype),
    )

  def in_parts(rows, kernel):
    sums = _sums_of_products(rows[0, 0].T[..., None], kernel)
    return sums.astype(rows.dtype)[None, None]

  return _by_rows(rows, kernel, rows.shape[:2], several=plain, one=in_parts)


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

  return _by_rows(rows, kernel, rows.shape[:-1], several=plain, one=padded)


def _by_rows(rows, kernel, leading, *, several, one):
  """`several` of rows and kernel, but on a GPU `one` of one row."""
  if math.prod(leading) != 1:
    return several(rows, kernel)
  return jax.lax.platform_dependent(rows, kernel, cuda=one, default=several)


def _sums_of_products(
  column: Float[Array, "in *ones"], kernel: Float[Array, "in *out"]
) -> Float32[Array, "*out"]:
  """`(column * kernel).sum(axis=0)` in float32.

  XLA's kernel for a sum over rows takes long ones in few blocks of threads; so
  parts of them, which it adds where the result is used.
  """
  parts = math.gcd(_PARTS, len(kernel))
  products = column.astype(jnp.float32) * kernel.astype(jnp.float32)
  return sum(products.reshape(parts, -1, *kernel.shape[1:]).sum(axis=1))
