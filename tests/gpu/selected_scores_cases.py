# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`selected_indexer_scores` and its gradients at the shapes of real models."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.hopper import row_sums
from pallas_kernels.indexer import shapes
from tests.gpu.cases import Case

_SHAPES = {
  **{
    name: s
    for name, s in shapes.SHAPES.items()
    if "decode" not in name and s.dim % 64 == 0
  },
  "glm_5_prefill_1m": shapes.Shape(1, 4096, 1048576, 32, 128, 2048),
  "glm_5_train_8k": shapes.Shape(2, 8192, 8192, 32, 128, 2048),
  "paper_train_8k": shapes.Shape(4, 8192, 8192, 16, 64, 256),
  "dim_64": shapes.Shape(2, 13, 40, 12, 64, 8),
}
_scores = functools.partial(
  pallas_kernels.selected_indexer_scores, implementation="mosaic_gpu"
)


def _gradients(index_q, index_k, weights, indices, grad):
  _, vjp = jax.vjp(
    lambda *args: _scores(*args, indices), index_q, index_k, weights
  )
  return vjp(grad)


def cases() -> list[Case]:
  """Both directions of each shape."""
  return [
    case for name, shape in _SHAPES.items() for case in _cases(name, shape)
  ]


def _cases(name, shape):
  batch, num_queries, num_keys, heads, dim, k = shape
  leading = (batch, num_queries)
  arguments = [
    jax.ShapeDtypeStruct((*leading, heads, dim), jnp.bfloat16),
    jax.ShapeDtypeStruct((batch, num_keys, dim), jnp.bfloat16),
    jax.ShapeDtypeStruct((*leading, heads), jnp.float32),
    jax.ShapeDtypeStruct((*leading, k), jnp.int32),
  ]
  grad = jax.ShapeDtypeStruct((*leading, k), jnp.float32)
  subset = name in ("dim_64", "paper_train_8k")
  return [
    Case(
      op="selected_scores",
      name=name,
      function=_scores,
      arguments=arguments,
      temp_bytes=1 << 24,
      subset=subset,
    ),
    Case(
      op="selected_scores",
      name=f"{name}_gradients",
      function=_gradients,
      arguments=[*arguments, grad],
      # The sums of all rows in float32 exceed a GiB at a million keys.
      temp_bytes=max(
        1 << 30, 4 * batch * num_keys * dim + row_sums.CHUNK_BYTES
      ),
      subset=subset,
    ),
  ]
