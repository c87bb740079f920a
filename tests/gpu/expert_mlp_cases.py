# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`expert_mlp` of GLM-4.7-Flash and GLM-5, the shared expert included."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.expert_mlp import shapes
from tests.gpu.cases import Case


def cases() -> list[Case]:
  """The table of shapes, one row and many."""
  array = jax.ShapeDtypeStruct
  return [
    Case(
      op="expert_mlp",
      name=name,
      function=functools.partial(
        pallas_kernels.expert_mlp, implementation="mosaic_gpu"
      ),
      arguments=[
        array((shape.rows, shape.width), jnp.bfloat16),
        array((shape.rows, shape.experts_per_row), jnp.int32),
        array((shape.rows, shape.experts_per_row), jnp.float32),
        array((shape.experts, shape.width, shape.inner), jnp.bfloat16),
        array((shape.experts, shape.width, shape.inner), jnp.bfloat16),
        array((shape.experts, shape.inner, shape.width), jnp.bfloat16),
        pallas_kernels.SharedExpert(
          gate=array((shape.width, shape.inner), jnp.bfloat16),
          up=array((shape.width, shape.inner), jnp.bfloat16),
          down=array((shape.inner, shape.width), jnp.bfloat16),
        ),
      ],
      subset=name == "glm_47_flash_decode",
      # JAX's kernel holds a word for each of 256 groups.
      spill_bytes=1400 if shape.experts > 64 else 0,
    )
    for name, shape in shapes.SHAPES.items()
    if name != "tiny"
  ]
