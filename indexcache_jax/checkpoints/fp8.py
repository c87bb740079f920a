# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's block-quantised FP8: one float32 factor for each block.

`weight[r, c] = quantised[r, c] * scale_inv[r // rows, c // columns]`, blocks of
128 x 128, the last ones cut off at the edge (DeepSeek-V3, README_WEIGHTS.md).
"""

import numpy as np

SCALE_SUFFIX = "_scale_inv"
DEFAULT_BLOCK = (128, 128)


def scale_shape(
  shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, ...]:
  """Returns the shape of a quantised tensor's factors."""
  rows, columns = shape[-2:]
  return (*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))


def dequantize_into(
  target: np.ndarray,
  quantized: np.ndarray,
  scale: np.ndarray,
  block: tuple[int, int],
  first_row: int = 0,
) -> None:
  """Writes `quantized * scale` into `target`, a few rows at a time.

  Args:
    target: [rows, columns] of any float dtype, a view as well; products are
      formed in float32 and rounded once.
    quantized: [rows, columns], float8_e4m3fn.
    scale: factors of the whole matrix that the rows belong to.
    block: rows and columns of a block.
    first_row: row of that matrix at which `quantized` begins.
  """
  rows, columns = quantized.shape
  scale = scale.astype(np.float32)
  for start in range(0, rows, block[0]):
    stop = min(start + block[0], rows)
    places = (np.arange(start, stop) + first_row) // block[0]
    factors = np.repeat(scale[places], block[1], axis=1)[:, :columns]
    target[start:stop] = (
      quantized[start:stop].astype(np.float32) * factors
    ).astype(target.dtype)
