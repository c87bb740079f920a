# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse MLA on a cache in the TPU kernel's own form.

For a server: packing a cache of 128K tokens moves 350 MB, the kernel's own
copies for 8 queries 25 MB, so a cache is packed as it is written.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch, tpu
from pallas_kernels.sparse_attention import mosaic_tpu, reference
from pallas_kernels.sparse_attention import mosaic_tpu_layout as layout
from pallas_kernels.sparse_attention.reference import SparseMLAResiduals

_ORDER: dict[str, tuple[str, ...]] = {"tpu": ("mosaic_tpu",)}


def sparse_mla_packed(
  query: Float[Array, "B T N C"],
  packed: layout.PackedLatent,
  topk_indices: Int32[Array, "B T K"],
  *,
  scale: float,
  value_dim: int,
  return_residuals: bool = False,
  implementation: str | None = None,
) -> (
  Float[Array, "B T N {value_dim}"]
  | tuple[Float[Array, "B T N {value_dim}"], SparseMLAResiduals]
):
  """`sparse_mla` of a packed cache; not differentiable.

  Args:
    query: as in `sparse_mla`.
    packed: the cache, of `query`'s width and dtype.
    topk_indices: as in `sparse_mla`.
    scale: as in `sparse_mla`.
    value_dim: as in `sparse_mla`.
    return_residuals: as in `sparse_mla`.
    implementation: "mosaic_tpu"; "xla", which unpacks the cache, a copy a
      call; None: the best for this platform.

  Raises:
    ValueError: shapes or dtypes that do not fit.
  """
  if (packed.words.shape[0], packed.width) != (
    query.shape[0],
    query.shape[-1],
  ) or packed.dtype != query.dtype:
    raise ValueError(
      "`packed` must have the batch, width and dtype of `query`: got a batch of"
      f" {packed.words.shape[0]}, width {packed.width}, {packed.dtype} for"
      f" query.shape={query.shape}, {query.dtype}."
    )
  out, residuals = dispatch.run(
    "sparse_mla_packed",
    {"mosaic_tpu": mosaic_tpu.sparse_mla_packed, "xla": _unpacked},
    _ORDER,
    implementation,
    query,
    packed,
    topk_indices,
    scale=scale,
    value_dim=value_dim,
  )
  return (out, residuals) if return_residuals else out


def _unpacked(query, packed, topk_indices, **kwargs):
  return reference.sparse_mla(
    query, layout.unpack(packed), topk_indices, **kwargs
  )


def is_preferred(dtype: DTypeLike, implementation: str | None) -> bool:
  """Whether a cache of `dtype` should be kept packed.

  Args:
    dtype: of the latents.
    implementation: that `sparse_mla` will be called with.
  """
  if implementation is None and jax.default_backend() != "tpu":
    return False
  if implementation not in (None, "mosaic_tpu"):
    return False
  try:
    tpu.chip()
  except NotImplementedError:
    return False
  return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
