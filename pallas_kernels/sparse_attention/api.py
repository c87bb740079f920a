# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse multi-head latent attention over selected rows."""

import functools

from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.sparse_attention import (
  mosaic_gpu,
  mosaic_tpu,
  packing,
  quantization,
  reference,
)
from pallas_kernels.sparse_attention.packing import PackedLatent
from pallas_kernels.sparse_attention.quantization import QuantizedLatents
from pallas_kernels.sparse_attention.reference import SparseMLAResiduals


def _mosaic_tpu(query, kv_latent, topk_indices, **kwargs):
  if isinstance(kv_latent, QuantizedLatents):
    raise NotImplementedError(
      "needs latents of one dtype on a TPU: got QuantizedLatents"
    )
  return mosaic_tpu.sparse_mla(query, kv_latent, topk_indices, **kwargs)


def _implementations(with_mean_probs, shares_rows):
  """By name; where nobody reads the mean probabilities XLA drops the others'.

  What one kernel computes with its output it can't drop.
  """
  return {
    "mosaic_gpu": functools.partial(
      mosaic_gpu.sparse_mla, shares_rows=shares_rows
    ),
    "mosaic_tpu": functools.partial(
      _mosaic_tpu, with_mean_probs=with_mean_probs
    ),
    "xla": reference.sparse_mla,
  }


_ORDER = {"gpu": ("mosaic_gpu",), "tpu": ("mosaic_tpu",)}
_ORDER_PACKED = {"tpu": ("mosaic_tpu",)}


def sparse_mla(
  query: Float[Array, "B T N C"],
  kv_latent: Float[Array, "B S C"] | QuantizedLatents,
  topk_indices: Int32[Array, "B T K"],
  *,
  scale: float,
  value_dim: int,
  return_residuals: bool = False,
  shares_rows: bool = False,
  implementation: str | None = None,
) -> (
  Float[Array, "B T N {value_dim}"]
  | tuple[Float[Array, "B T N {value_dim}"], SparseMLAResiduals]
):
  """Attends to exactly the selected rows, in latent (absorbed) form.

  `out[t, n] = softmax_k(scale query[t, n] . row_k) row_k[:value_dim]` over the
  rows `kv_latent[topk_indices[t]]`, which all heads share; logits, softmax and
  sums in float32. Source: DeepSeek-V3.2 technical report, section 2.1.

  Args:
    query: queries in the latent's space, key up-projection absorbed.
    kv_latent: one row a token; or `quantize_latents` of such rows with the
      same `value_dim`: attends to the rows that these stand for, 3 % (normal
      rows) to 8 % (1 value in 100 a hundred times the others) from what the
      exact rows give. Not in mosaic_tpu; in mosaic_gpu with a multiple of 256
      values.
    topk_indices: rows of each query, each at most once, -1 for none; in any
      order.
    scale: factor on the logits.
    value_dim: leading columns of a row that are its value (kv_lora_rank).
    return_residuals: also return `SparseMLAResiduals`.
    shares_rows: `topk_indices` ascend, -1 behind them, as `indexer_topk` has
      them, and queries that follow each other select much the same: then each
      row is read once for up to 4 of them. Where it is not so, slower, and of
      indices in another order wrong; a row that is not finite reaches all of
      them. Many queries of at most 32 heads in mosaic_gpu; elsewhere it changes
      nothing.
    implementation: "mosaic_gpu", "mosaic_tpu", "xla"; None: the best for this
      platform.

  Returns:
    Output in `query`'s dtype, zeros for a query without a row; with residuals
    if asked. Differentiable in `query` and `kv_latent`; in `query` alone, and
    in XLA, where the latents are quantized. Memory beyond that:
    chunks of queries in XLA, recomputed in the backward pass; in mosaic_gpu's
    backward pass a float32 copy of `kv_latent`, less than 672 MiB and, of
    heads in no multiple of 8, copies of all that is theirs; in mosaic_tpu's a
    float32 copy for each core and one packed for the kernel.

  Raises:
    ValueError: shapes that do not fit; a gradient of quantized latents.
  """
  _check("kv_latent", query, kv_latent, topk_indices, value_dim)
  if isinstance(kv_latent, QuantizedLatents):
    kv_latent = quantization.undifferentiated(kv_latent)
  out, residuals = dispatch.run(
    "sparse_mla",
    _implementations(return_residuals, shares_rows),
    _ORDER,
    implementation,
    query,
    kv_latent,
    topk_indices,
    scale=scale,
    value_dim=value_dim,
  )
  return (out, residuals) if return_residuals else out


def sparse_mla_packed(
  query: Float[Array, "B T N C"],
  packed: PackedLatent,
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
  """`sparse_mla` of a packed cache, which a TPU's kernel reads in place.

  For a server: packing a cache of 128K tokens moves 350 MB, the kernel's own
  copies for 8 queries 25 MB, so a cache is packed as it is written.

  Args:
    query: as in `sparse_mla`.
    packed: the cache, of `query`'s batch, width and dtype; see `packing`.
    topk_indices: as in `sparse_mla`.
    scale: as in `sparse_mla`.
    value_dim: as in `sparse_mla`.
    return_residuals: as in `sparse_mla`.
    implementation: "mosaic_tpu"; "xla", which unpacks the cache, a copy a
      call; None: the best for this platform.

  Returns:
    As `sparse_mla`, but not differentiable.

  Raises:
    ValueError: shapes or dtypes that do not fit.
  """
  _check("packed", query, packed, topk_indices, value_dim)
  packing.check(packed)
  if packed.dtype != query.dtype:
    raise ValueError(
      "`packed` must have the dtype of `query`: got"
      f" packed.dtype={packed.dtype}, query.dtype={query.dtype}. Cast `query`,"
      " or pack rows of its dtype."
    )
  out, residuals = dispatch.run(
    "sparse_mla_packed",
    {
      "mosaic_tpu": functools.partial(
        mosaic_tpu.sparse_mla_packed, with_mean_probs=return_residuals
      ),
      "xla": _unpacked,
    },
    _ORDER_PACKED,
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
    query, packing.unpack(packed), topk_indices, **kwargs
  )


def _check(name, query, kv_latent, topk_indices, value_dim):
  batch, _, _, width = query.shape
  if (kv_latent.shape[0], kv_latent.shape[-1]) != (batch, width):
    raise ValueError(
      f"`{name}` must have the batch and width of `query`: got"
      f" {name}.shape={kv_latent.shape}, query.shape={query.shape}."
    )
  if topk_indices.shape[:2] != query.shape[:2]:
    raise ValueError(
      "`topk_indices` must have one row a query: got"
      f" topk_indices.shape={topk_indices.shape}, query.shape={query.shape}."
    )
  if isinstance(kv_latent, QuantizedLatents):
    quantization.check(kv_latent, value_dim)
  if not 1 <= value_dim <= width:
    raise ValueError(
      "`value_dim` must be 1 to the latent's width: got"
      f" value_dim={value_dim} for a width of {width}."
    )
