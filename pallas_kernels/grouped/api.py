# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Matrix products of sorted rows, each group with its own matrix."""

from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.grouped import mosaic_gpu, reference

_IMPLEMENTATIONS = {
  "xla": reference.grouped_matmul,
  "mosaic_gpu": mosaic_gpu.grouped_matmul,
}
_ORDER = {"gpu": ("mosaic_gpu",)}


def grouped_matmul(
  rows: Float[Array, "M E"],
  matrices: Float[Array, "G E F"],
  group_sizes: Int32[Array, " G"],
  *,
  implementation: str | None = None,
) -> Float[Array, "M F"]:
  """Multiplies the rows of group g by `matrices[g]`.

  Args:
    rows: sorted by group: the first `group_sizes[0]` belong to group 0.
    matrices: one a group, of `rows`' dtype.
    group_sizes: rows of each group, M in all.
    implementation: "xla" (`jax.lax.ragged_dot`), "mosaic_gpu" (the grouped
      product that ships with JAX; bfloat16 and float16 on Hopper); None: the
      best for this platform.

  Returns:
    Products in `rows`' dtype, summed in float32. Differentiable in `rows` and
    `matrices`.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: a named implementation that can't run here.
  """
  if rows.shape[1] != matrices.shape[1] or rows.dtype != matrices.dtype:
    raise ValueError(
      "`matrices` must have the width and dtype of `rows`: got"
      f" matrices {matrices.dtype}{matrices.shape},"
      f" rows {rows.dtype}{rows.shape}."
    )
  if group_sizes.shape != matrices.shape[:1]:
    raise ValueError(
      "`group_sizes` must have one entry a matrix: got"
      f" group_sizes.shape={group_sizes.shape},"
      f" matrices.shape={matrices.shape}."
    )
  return dispatch.run(
    "grouped_matmul",
    _IMPLEMENTATIONS,
    _ORDER,
    implementation,
    rows,
    matrices,
    group_sizes,
  )
