# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense attention's statistics at the warm-up's chunks of real models."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.dense_attention import shapes
from tests.gpu.cases import Case

# A million keys, and lengths that no block divides.
_MORE = {
  "glm_5_1m": shapes.Shape(1, 128, 1048576, 64, 576),
  "odd": shapes.Shape(2, 77, 3001, 20, 100),
}


def cases() -> list[Case]:
  """Every shape of the table, and odd ones."""
  struct = jax.ShapeDtypeStruct
  return [
    Case(
      op="dense_attention",
      name=name,
      function=functools.partial(
        pallas_kernels.dense_mla_residuals,
        scale=0.1,
        implementation="mosaic_gpu",
      ),
      arguments=[
        struct((batch, queries, heads, width), jnp.bfloat16),
        struct((batch, keys, width), jnp.bfloat16),
        struct((batch, queries), jnp.int32),
        struct((batch, queries), jnp.int32),
      ],
      temp_bytes=1 << 25,
      subset=name in ("glm_5_32k", "odd"),
    )
    for name, (batch, queries, keys, heads, width) in (
      shapes.SHAPES | _MORE
    ).items()
  ]
