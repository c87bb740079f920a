# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`grouped_matmul` at GLM-5's experts; expert_mlp_cases.py has the others'."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.grouped import shapes
from tests.gpu.cases import Case


def cases() -> list[Case]:
  """Many experts, and a row count that 8 does not divide."""
  table = {
    "glm_5_4k": shapes.SHAPES["glm_5_4k"],
    "odd_rows": shapes.Shape(137, 8, 128, 256),
  }
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
