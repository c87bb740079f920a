# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The grouped product on Hopper: JAX's Mosaic GPU kernel.

XLA's `ragged_dot` multiplies every row by every group's matrix on a GPU: 11
TFLOP/s at 64 experts and 16K rows on an H200, where this kernel does 424.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.grouped import reference
from pallas_kernels.hopper import chip


class Tiles(NamedTuple):
  """What a sweep on a card decides: parameters of JAX's kernel."""

  block_m: int
  block_n: int
  block_k: int
  max_concurrent_steps: int
  grid_block_n: int


# Of widths: what the blocks divide.
_MULTIPLE = 128
# Hopper: measured on an H200 at 64 experts, 2048 x 1536, 4K and 16K rows;
# `experiments.sweep_tiles` times others.
TILES = Tiles(
  block_m=128, block_n=128, block_k=64, max_concurrent_steps=5, grid_block_n=4
)


def grouped_matmul(
  rows: Float[Array, "M E"],
  matrices: Float[Array, "G E F"],
  group_sizes: Int32[Array, " G"],
  *,
  tiles: Tiles | None = None,
) -> Float[Array, "M F"]:
  """Runs the kernel forward and for the rows' gradient.

  Args:
    rows: sorted by group.
    matrices: one a group.
    group_sizes: rows of each group.
    tiles: for a sweep; None: `TILES`.

  Raises:
    NotImplementedError: another dtype, another GPU, or widths that do not
      divide into the kernel's blocks.
  """
  check(rows, matrices)
  return _grouped(rows, matrices, group_sizes, tiles or TILES)


def check(rows, matrices):
  """Raises NotImplementedError where the kernel can't run."""
  _, width, out_width = matrices.shape
  if rows.dtype.itemsize != 2:
    raise NotImplementedError(
      f"needs a 16-bit dtype for the matrix units: got {rows.dtype}"
    )
  # The backward pass swaps the two widths.
  if width % _MULTIPLE or out_width % _MULTIPLE:
    raise NotImplementedError(
      f"needs widths that are multiples of {_MULTIPLE}: got {width} x"
      f" {out_width}"
    )
  chip.chip()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(rows, matrices, group_sizes, tiles):
  return _kernel(rows, matrices, group_sizes, tiles, transpose=False)


def _forward(*args):
  return _grouped(*args), args[:3]


def _backward(tiles, residuals, grad):
  rows, matrices, group_sizes = residuals
  grad_rows = _kernel(grad, matrices, group_sizes, tiles, transpose=True)
  # The kernel has no form that sums over rows, so the matrices' gradient is
  # XLA's: exact, and slow for many groups.
  _, vjp = jax.vjp(
    lambda m: reference.grouped_matmul(rows, m, group_sizes), matrices
  )
  return grad_rows, vjp(grad)[0], None


_grouped.defvjp(_forward, _backward)


def _kernel(rows, matrices, group_sizes, tiles, *, transpose):
  # Imported here: it needs jaxlib's Mosaic GPU dialect, which CPU wheels of
  # some platforms lack.
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

  num_rows = rows.shape[0]
  # Its row copies move tiles of 8; the added rows belong to no group.
  rows = jnp.pad(rows, ((0, -num_rows % 8), (0, 0)))
  out = ragged_dot_mgpu.ragged_dot(
    rows,
    matrices,
    group_sizes=group_sizes,
    **tiles._asdict(),
    transpose_rhs=transpose,
  )
  return out[:num_rows]
