# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The experts' MLPs: `sum_j weight_j down_j(silu(gate_j(x)) * up_j(x))`.

Each token goes through the experts that routing chose for it, and through the
shared expert with weight 1 (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.expert_mlp import mosaic_gpu, reference
from pallas_kernels.expert_mlp import shared as shared_lib

_IMPLEMENTATIONS = {
  "xla": reference.expert_mlp,
  "mosaic_gpu": mosaic_gpu.expert_mlp,
}
_ORDER = {"gpu": ("mosaic_gpu",)}


def expert_mlp(
  rows: Float[Array, "M E"],
  experts: Int32[Array, "M J"],
  weights: Float32[Array, "M J"],
  gate: Float[Array, "G E F"],
  up: Float[Array, "G E F"],
  down: Float[Array, "G F E"],
  shared: shared_lib.SharedExpert | None = None,
  *,
  implementation: str | None = None,
) -> Float[Array, "M E"]:
  """Returns the weighted sum of each row's experts.

  Args:
    rows: one a token.
    experts: the J different experts of each, from 0 to G - 1.
    weights: of their outputs.
    gate: G matrices, of `rows`' dtype.
    up: likewise.
    down: likewise.
    shared: the expert of all rows, of a multiple of the others' width F.
    implementation: "xla" (sorted rows and `jax.lax.ragged_dot`), "mosaic_gpu"
      (16-bit dtypes on Hopper: a kernel of its own up to 64 rows, whose cost
      is the used matrices' bytes; above, sorted rows and the grouped product
      that ships with JAX); None: the best for this platform.

  Returns:
    Sums in `rows`' dtype: products are rounded to it, weighted and added in
    float32; the shared expert's output is rounded and added to that.
    Differentiable in `rows`, `weights` and the matrices. Memory: the M J inner
    rows; up to 64 rows on a GPU, M times as many.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: a named implementation that can't run here.
  """
  _check(rows, experts, weights, gate, up, down)
  if shared is not None:
    _check_shared(rows, gate, *shared)
  return dispatch.run(
    "expert_mlp",
    _IMPLEMENTATIONS,
    _ORDER,
    implementation,
    rows,
    experts,
    weights,
    gate,
    up,
    down,
    shared,
  )


def _check(rows, experts, weights, gate, up, down):
  if experts.shape != weights.shape or experts.shape[0] != rows.shape[0]:
    raise ValueError(
      "`experts` and `weights` must have one row a row of `rows`: got"
      f" experts.shape={experts.shape}, weights.shape={weights.shape},"
      f" rows.shape={rows.shape}."
    )
  num_experts, width, inner = gate.shape
  if (
    width != rows.shape[1]
    or up.shape != gate.shape
    or down.shape != (num_experts, inner, width)
  ):
    raise ValueError(
      "`gate` and `up` must be [G, E, F] and `down` [G, F, E] for `rows` of"
      f" width E: got gate.shape={gate.shape}, up.shape={up.shape},"
      f" down.shape={down.shape}, rows.shape={rows.shape}."
    )
  if {gate.dtype, up.dtype, down.dtype} != {rows.dtype}:
    raise ValueError(
      "`gate`, `up` and `down` must have the dtype of `rows`: got"
      f" {gate.dtype}, {up.dtype}, {down.dtype} for {rows.dtype}."
    )


def _check_shared(rows, gate, shared_gate, shared_up, shared_down):
  width, inner = rows.shape[1], gate.shape[2]
  shared_inner = shared_down.shape[0]
  if (
    shared_gate.shape != (width, shared_inner)
    or shared_up.shape != shared_gate.shape
    or shared_down.shape != (shared_inner, width)
    or not shared_inner
    or shared_inner % inner
  ):
    raise ValueError(
      "`shared` must be [E, n F], [E, n F] and [n F, E] for `rows` of width E"
      f" and `gate` of inner width F: got {shared_gate.shape},"
      f" {shared_up.shape}, {shared_down.shape} for E={width}, F={inner}."
    )
  dtypes = [x.dtype for x in (shared_gate, shared_up, shared_down)]
  if set(dtypes) != {rows.dtype}:
    raise ValueError(
      "`shared` must have the dtype of `rows`: got"
      f" {', '.join(map(str, dtypes))} for {rows.dtype}."
    )
