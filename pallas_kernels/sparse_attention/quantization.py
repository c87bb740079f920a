# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Latent rows with their values in 8-bit floats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Int32

from pallas_kernels import rows as rows_lib

# Columns that share a scale.
BLOCK = 128
# Largest finite float8_e4m3fn.
_LARGEST = 448.0
# Shifted into bfloat16's fields, a float8 number's bits are 2^-120 times its
# value: the highest scale times 2^120 is still a bfloat16 number, so that one
# product widens. The lowest leaves no product below bfloat16's normal numbers.
_MIN_EXPONENT, _MAX_EXPONENT = -110, 7


class QuantizedLatents(NamedTuple):
  """Latent rows: values in float8, the rest (RoPE columns) in bfloat16.

  A row of DeepSeek's widths, 512 values of 576 columns, has 648 bytes: 512,
  128, and 8 of scales, in place of 1152. But for the scales, each array's rows
  are whole 32-byte sectors of memory: a gather of single rows reads 672.

  Attributes:
    values: value columns over their block's scale; V = kv_lora_rank. NaN only
      where the scale is.
    scales: of each block of 128 value columns, the last one maybe of fewer;
      powers of two, so that a product with a value is exact in bfloat16. NaN:
      the block is NaN.
    rest: the other columns, R = C - V.
  """

  values: Float8e4m3fn[Array, "*B S V"]
  scales: BFloat16[Array, "*B S blocks"]
  rest: BFloat16[Array, "*B S R"]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the rows that these stand for: `[*B, S, C]`."""
    width = self.values.shape[-1] + self.rest.shape[-1]
    return (*self.values.shape[:-1], width)


def quantize_latents(
  kv_latent: Float[Array, "*B S C"], value_dim: int
) -> QuantizedLatents:
  """Rounds the value columns of latent rows to float8_e4m3fn.

  A float8 number has 4 significant bits, so a value is at most 1/16 of itself
  off, 2.6% on average, down to 2^-14.8 of its block's largest one; what is
  below 2^-18.8 of that becomes 0. RoPE columns are rounded to bfloat16 alone,
  as logits depend on them most.

  What this saves is memory: on one H200 prefill of 4096 x 131072 with 64 heads
  took `sparse_mla` 2.80 ms, and 2.12 in bfloat16; decoding 64 sequences 61 and
  56 us (results/kernels).

  Args:
    kv_latent: rows.
    value_dim: leading columns that are values.

  Returns:
    The rows in `648 / 1152` of bfloat16's bytes at 512 of 576 columns. A value
    above 57,344 is cut to that; a block with one that is not finite is NaN.

  Raises:
    ValueError: `value_dim` is not between 1 and C.
  """
  width = kv_latent.shape[-1]
  if not 1 <= value_dim <= width:
    raise ValueError(
      "`value_dim` must be 1 to the latent's width: got"
      f" value_dim={value_dim} for a width of {width}."
    )
  values = kv_latent[..., :value_dim].astype(jnp.float32)
  padding = [(0, 0)] * (values.ndim - 1) + [(0, -value_dim % BLOCK)]
  blocks = jnp.pad(values, padding).reshape(*values.shape[:-1], -1, BLOCK)
  largest = jnp.max(jnp.abs(blocks), axis=-1)
  is_finite = jnp.all(jnp.isfinite(blocks), axis=-1)
  # The exponent e of the least 2^e with largest <= 448 * 2^e.
  fraction, exponent = jnp.frexp(largest / _LARGEST)
  exponent = exponent - (fraction == 0.5)
  exponent = jnp.clip(exponent, _MIN_EXPONENT, _MAX_EXPONENT)
  scales = jnp.ldexp(jnp.float32(1), exponent)
  blocks = jnp.clip(blocks / scales[..., None], -_LARGEST, _LARGEST)
  values = blocks.reshape(*values.shape[:-1], -1)[..., :value_dim]
  # Not by `largest`: XLA's maximum of many numbers on a CPU passes over a NaN.
  scales = jnp.where(is_finite, scales, jnp.nan)
  return QuantizedLatents(
    values=values.astype(jnp.float8_e4m3fn),
    scales=scales.astype(jnp.bfloat16),
    rest=kv_latent[..., value_dim:].astype(jnp.bfloat16),
  )


def dequantize_latents(
  latents: QuantizedLatents,
) -> BFloat16[Array, "*B S C"]:
  """The rows that `sparse_mla` attends to, exactly."""
  scales = jnp.repeat(latents.scales, BLOCK, axis=-1)
  scales = scales[..., : latents.values.shape[-1]]
  values = latents.values.astype(jnp.bfloat16) * scales
  return jnp.concatenate([values, latents.rest], axis=-1)


def check(latents: QuantizedLatents, value_dim: int) -> None:
  """Raises ValueError where shapes don't fit each other or `value_dim`."""
  shapes = {name: x.shape for name, x in latents._asdict().items()}
  leading = latents.values.shape[:-1]
  blocks = -(-value_dim // BLOCK)
  expected = {
    "values": (*leading, value_dim),
    "scales": (*leading, blocks),
    "rest": (*leading, latents.rest.shape[-1]),
  }
  if shapes != expected:
    raise ValueError(
      f"`kv_latent` was quantized for another `value_dim` than {value_dim}, or"
      f" its arrays are of different rows: got {shapes}, expected {expected}."
    )


def gather_rows(
  kv_latent: Float[Array, "B S C"] | QuantizedLatents,
  indices: Int32[Array, "B T K"],
  dtype: jnp.dtype,
) -> Float[Array, "B T K C"]:
  """Rows of either form; zeros where the index is -1.

  Args:
    kv_latent: rows.
    indices: of them.
    dtype: of what float8 rows become.
  """
  if not isinstance(kv_latent, QuantizedLatents):
    return rows_lib.gather_rows(kv_latent, indices)
  rows = jax.tree.map(
    lambda table: rows_lib.gather_rows(table, indices), kv_latent
  )
  return dequantize_latents(rows).astype(dtype)


@jax.custom_vjp
def undifferentiated(latents: QuantizedLatents) -> QuantizedLatents:
  """The same latents.

  Raises:
    ValueError: a gradient with respect to them is asked for.
  """
  return latents


def _forward(latents):
  if any(primal.perturbed for primal in jax.tree.leaves(latents)):
    raise ValueError(
      "`sparse_mla` is differentiable in `query` alone when `kv_latent` is"
      " quantized, for rounding has no gradient: give the latents in bfloat16"
      " to train them, or `jax.lax.stop_gradient` of the quantized ones."
    )
  return jax.tree.map(lambda primal: primal.value, latents), None


def _backward(_, grads):
  del grads
  return (None,)


undifferentiated.defvjp(_forward, _backward, symbolic_zeros=True)
