# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The indexer at the real shapes, in both of its kernels' dtypes."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.indexer import shapes
from tests.gpu.cases import Case

# What the tables of real models lack: lengths that no tile divides, and
# several queries a step.
_ODD = {
  "odd": shapes.Shape(2, 1001, 30001, 24, 100, 2048),
  "glm_47_flash_verify_128k": shapes.Shape(4, 3, 131072, 32, 128, 2048),
}
_SUBSET = ("glm_5_prefill_32k", "glm_5_decode_128k", "odd")


def cases() -> list[Case]:
  """Scores and selections; scores only where they fit the GPU."""
  made = []
  for name, shape in (shapes.SHAPES | _ODD).items():
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
      full_name = f"{name}_{jnp.dtype(dtype).name}"
      made.append(
        Case(
          op="indexer",
          name=f"topk_{full_name}",
          function=functools.partial(_topk, k=shape.k),
          arguments=_arguments(shape, dtype),
          subset=name in _SUBSET,
        )
      )
      made.append(
        Case(
          op="indexer",
          name=f"scores_{full_name}",
          function=_scores,
          arguments=_arguments(shape, dtype),
          temp_bytes=_padding_bytes(shape),
        )
      )
  return made


def _arguments(shape, dtype):
  batch, queries, keys, heads, dim, _ = shape
  struct = jax.ShapeDtypeStruct
  made = [
    struct((batch, queries, heads, dim), dtype),
    struct((batch, keys, dim), dtype),
    struct((batch, queries, heads), jnp.float32),
    struct((batch, queries), jnp.int32),
    struct((batch, queries), jnp.int32),
  ]
  if dtype == jnp.float8_e4m3fn:
    made.append(struct((batch, keys), jnp.float32))
  return made


def _padding_bytes(shape):
  """Padded scores, where tiles do not divide them, and some small arrays."""
  rows = max(shape.num_queries + 7, 64)
  columns = max(shape.num_keys + 31, 768)
  is_whole = shape.num_keys % 32 == 0 and (
    shape.num_queries % 8 == 0 or shape.num_queries * shape.heads <= 256
  )
  return (1 << 24) + (not is_whole) * 8 * shape.batch * rows * columns


def _topk(*args, k):
  *args, key_scale = args if len(args) == 6 else (*args, None)
  return pallas_kernels.indexer_topk(
    *args, k=k, key_scale=key_scale, implementation="mosaic_gpu"
  )


def _scores(*args):
  *args, key_scale = args if len(args) == 6 else (*args, None)
  return pallas_kernels.indexer_scores(
    *args, key_scale=key_scale, implementation="mosaic_gpu"
  )
