# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`top_k` at the rows that DeepSeek-V3.2 and GLM-5 select from."""

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.topk import shapes
from tests.gpu.cases import Case

_SUBSET = ("prefill_32k", "decode_1m", "odd")


def cases() -> list[Case]:
  """The table of shapes, 8K keys, odd ones, and the largest k."""
  table = {
    **shapes.SHAPES,
    "prefill_8k": shapes.Shape(4096, 8192, 2048),
    "prefill_1m": shapes.Shape(128, 1048576, 2048),
    "decode_8k": shapes.Shape(64, 8192, 2048),
    "decode_64_1m": shapes.Shape(64, 1048576, 2048),
    "odd": shapes.Shape(13, 50003, 700),
    "largest_k": shapes.Shape(16, 65536, 8192),
  }
  return [
    _case(name, shape, has_lengths)
    for name, shape in table.items()
    for has_lengths in (False, True)
  ]


def _case(name, shape, has_lengths):
  arguments = [jax.ShapeDtypeStruct((shape.rows, shape.num_keys), jnp.float32)]
  if has_lengths:
    arguments.append(jax.ShapeDtypeStruct((shape.rows,), jnp.int32))

  def function(scores, lengths=None):
    return pallas_kernels.top_k(
      scores, shape.k, lengths, implementation="mosaic_gpu"
    )

  return Case(
    op="topk",
    name=f"{name}_lengths" if has_lengths else name,
    function=function,
    arguments=arguments,
    # Two words a candidate of each segment, where a row has several.
    temp_bytes=1 << 25,
    subset=has_lengths and name in _SUBSET,
  )
