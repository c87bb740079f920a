# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The indexer at the real shapes, in both of its kernels' dtypes."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.indexer import shapes
from tests.gpu.cases import Case

# What the tables of real models lack: lengths that no tile divides, several
# queries a step, some of a million keys.
_MORE = {
  "odd": shapes.Shape(2, 1001, 30001, 24, 100, 2048),
  "glm_5_prefill_1m": shapes.Shape(1, 512, 1048576, 32, 128, 2048),
  "deepseek_v32_prefill_1m": shapes.Shape(1, 512, 1048576, 64, 128, 2048),
  "glm_47_flash_verify_128k": shapes.Shape(4, 3, 131072, 32, 128, 2048),
  # Whole tiles of 8 keys, but no whole line of scores.
  "decode_210000": shapes.Shape(1, 1, 210000, 32, 128, 2048),
  # No window divides them: of queries, and of sequences.
  "two_of_128k": shapes.Shape(2, 4099, 131072, 32, 128, 2048),
  "decode_of_131_1m": shapes.Shape(131, 1, 1048576, 32, 128, 2048),
}
_ALL = shapes.SHAPES | _MORE
_SUBSET = ("glm_5_prefill_32k", "decode_210000", "odd")
_WHOLE = (
  "deepseek_v32_prefill_128k",
  "glm_5_prefill_128k",
  "deepseek_v32_prefill_1m",
  "glm_5_prefill_1m",
)


def cases() -> list[Case]:
  """Selections, whose chunks are scored by the same kernels, and scores."""
  return [
    Case(
      op="indexer",
      name=f"{kind}_{name}_{jnp.dtype(dtype).name}",
      function=functools.partial(_topk, k=shape.k)
      if kind == "topk"
      else _scores,
      arguments=_arguments(shape, dtype),
      temp_bytes=_temp_bytes(kind, name),
      subset=kind == "topk" and name in _SUBSET,
    )
    for kind, table in (
      ("topk", _ALL),
      # In one piece, not in chunks.
      ("scores", {name: _ALL[name] for name in _WHOLE}),
    )
    for name, shape in table.items()
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn)
  ]


def _temp_bytes(kind, name):
  if kind == "scores":
    return 1 << 22
  # No room for a copy of the keys, which would take longer than their scores.
  return 1 << 24 if name == "decode_210000" else 1 << 30


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
