# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense MLA's log-sum-exp and head-averaged probabilities."""

import jax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.dense_attention import mosaic_gpu, reference

_IMPLEMENTATIONS = {
  "mosaic_gpu": mosaic_gpu.dense_mla_residuals,
  "xla": reference.dense_mla_residuals,
}
_ORDER: dict[str, tuple[str, ...]] = {"gpu": ("mosaic_gpu",)}


def dense_mla_residuals(
  query: Float[Array, "B T N C"],
  kv_latent: Float[Array, "B S C"],
  key_start: Int32[Array, "B T"],
  key_end: Int32[Array, "B T"],
  *,
  scale: float,
  implementation: str | None = None,
) -> tuple[Float32[Array, "B T N"], Float32[Array, "B T S"]]:
  """Returns what dense attention says of its keys, without its output.

  The teacher of an indexer's warm-up: not differentiable, the arguments are
  detached. The probabilities are T x S: call it on chunks of queries, of at
  least 128 on a GPU.

  Args:
    query: queries in the latent's space.
    kv_latent: latents, shared by the heads.
    key_start: first visible key of each query.
    key_end: one past its last visible key.
    scale: factor on the logits.
    implementation: "mosaic_gpu", "xla"; None: the best for this platform.

  Returns:
    Natural log-sum-exp of the scaled logits over the visible keys, -inf where
    there are none; and the probabilities' mean over heads, 0 where a key is
    not visible.

  Raises:
    ValueError: shapes that do not fit.
  """
  _check(query, kv_latent, key_start, key_end)
  query, kv_latent = jax.lax.stop_gradient((query, kv_latent))
  return dispatch.run(
    "dense_mla_residuals",
    _IMPLEMENTATIONS,
    _ORDER,
    implementation,
    query,
    kv_latent,
    key_start,
    key_end,
    scale=scale,
  )


def _check(query, kv_latent, key_start, key_end):
  batch, queries, _, width = query.shape
  if (kv_latent.shape[0], kv_latent.shape[-1]) != (batch, width):
    raise ValueError(
      "`kv_latent` must have the batch and width of `query`: got"
      f" kv_latent.shape={kv_latent.shape}, query.shape={query.shape}."
    )
  for array in (key_start, key_end):
    if array.shape != (batch, queries):
      raise ValueError(
        "`key_start` and `key_end` must have one entry a query: got"
        f" {array.shape}, query.shape={query.shape}."
      )
