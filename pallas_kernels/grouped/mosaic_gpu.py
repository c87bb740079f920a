# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The grouped product on Hopper: JAX's Mosaic GPU kernel, ours for few rows.

XLA's `ragged_dot` multiplies every row by every group's matrix on a GPU: 11
TFLOP/s at 64 experts and 16K rows on an H200, where this kernel does 424.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.grouped import mosaic_gpu_few_rows as few_rows
from pallas_kernels.grouped import reference
from pallas_kernels.hopper import chip

# Measured on an H200 at 64 experts, 2048 x 1536, 4K and 16K rows.
_BLOCK_M, _BLOCK_N, _BLOCK_K, _STEPS, _GRID_BLOCK_N = 128, 128, 64, 5, 4


def grouped_matmul(
  rows: Float[Array, "M E"],
  matrices: Float[Array, "G E F"],
  group_sizes: Int32[Array, " G"],
) -> Float[Array, "M F"]:
  """Runs the kernel forward and for the rows' gradient.

  Raises:
    NotImplementedError: another dtype, another GPU, or widths that do not
      divide into the kernel's blocks.
  """
  _check(rows, matrices)
  return _grouped(rows, matrices, group_sizes)


def _check(rows, matrices):
  _, width, out_width = matrices.shape
  if rows.dtype.itemsize != 2:
    raise NotImplementedError(
      f"needs a 16-bit dtype for the matrix units: got {rows.dtype}"
    )
  # The backward pass swaps the two widths.
  if width % _BLOCK_N or out_width % _BLOCK_N:
    raise NotImplementedError(
      f"needs widths that are multiples of {_BLOCK_N}: got {width} x"
      f" {out_width}"
    )
  chip.chip()


@jax.custom_vjp
def _grouped(rows, matrices, group_sizes):
  return _kernel(rows, matrices, group_sizes, transpose=False)


def _forward(rows, matrices, group_sizes):
  return _grouped(rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(residuals, grad):
  rows, matrices, group_sizes = residuals
  grad_rows = _kernel(grad, matrices, group_sizes, transpose=True)
  # The kernel has no form that sums over rows, so the matrices' gradient is
  # XLA's: exact, and slow for many groups.
  _, vjp = jax.vjp(
    lambda m: reference.grouped_matmul(rows, m, group_sizes), matrices
  )
  return grad_rows, vjp(grad)[0], None


_grouped.defvjp(_forward, _backward)


def _kernel(rows, matrices, group_sizes, *, transpose):
  # Imported here: it needs jaxlib's Mosaic GPU dialect, which CPU wheels of
  # some platforms lack.
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

  num_rows = rows.shape[0]
  # Its row copies move tiles of 8; the added rows belong to no group.
  rows = jnp.pad(rows, ((0, -num_rows % 8), (0, 0)))
  if num_rows <= few_rows.MAX_ROWS and not transpose:
    return few_rows.grouped_matmul(rows, matrices, group_sizes)[:num_rows]
  out = ragged_dot_mgpu.ragged_dot(
    rows,
    matrices,
    group_sizes=group_sizes,
    block_m=_BLOCK_M,
    block_n=_BLOCK_N,
    block_k=_BLOCK_K,
    max_concurrent_steps=_STEPS,
    grid_block_n=_GRID_BLOCK_N,
    transpose_rhs=transpose,
  )
  return out[:num_rows]
