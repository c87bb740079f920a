# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`grouped_matmul` at the experts of GLM-4.7-Flash and GLM-5."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.grouped import shapes
from tests.gpu.cases import Case


def cases() -> list[Case]:
  """The table of shapes, and a row count that 8 does not divide."""
  table = {
    name: shapes.SHAPES[name] for name in ("glm_47_flash_4k", "glm_5_4k")
  }
  table["glm_47_flash_decode"] = shapes.Shape(4, 64, 2048, 1536)
  table["odd_rows"] = shapes.Shape(137, 8, 128, 256)
  return [
    Case(
      op="grouped",
      name=name,
      function=functools.partial(
        pallas_kernels.grouped_matmul, implementation="mosaic_gpu"
      ),
      arguments=[
        jax.ShapeDtypeStruct((shape.rows, shape.width), jnp.bfloat16),
        jax.ShapeDtypeStruct(
          (shape.groups, shape.width, shape.out_width), jnp.bfloat16
        ),
        jax.ShapeDtypeStruct((shape.groups,), jnp.int32),
      ],
      subset=shape.rows < 200,
      # JAX's kernel holds a word for each of 256 groups.
      spill_bytes=1400 if shape.groups > 64 else 0,
    )
    for name, shape in table.items()
  ]
