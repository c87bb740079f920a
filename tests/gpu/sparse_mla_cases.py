# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`sparse_mla` of real models: prefill and decode, 8K to 1M keys."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.sparse_attention import shapes
from tests.gpu.cases import Case

_HEADS = {"deepseek_v32": 128, "glm_5": 64, "glm_47_flash": 20}
_LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072, "1m": 1 << 20}
_SUBSET = (
  "glm_5_prefill_32k",
  "glm_47_flash_prefill_128k",
  "glm_5_decode_of_8_128k",
  "tiny",
)


def cases() -> list[Case]:
  """Each model's prefill and decode at each length; edges; residuals."""
  found = []
  for model, heads in _HEADS.items():
    for length, keys in _LENGTHS.items():
      prefill = shapes.Shape(1, 4096, keys, heads, 576, 512, 2048)
      found.append(_case(f"{model}_prefill_{length}", prefill))
      for batch in (1, 8, 64) if length == "128k" else (1,):
        decode = shapes.Shape(batch, 1, keys, heads, 576, 512, 2048)
        found.append(_case(f"{model}_decode_of_{batch}_{length}", decode))
  edges = {
    "tiny": shapes.SHAPES["tiny"],
    "small_model": shapes.Shape(2, 512, 512, 8, 192, 128, 64),
    "no_rope": shapes.Shape(1, 512, 4096, 64, 512, 512, 2048),
    "odd_heads": shapes.Shape(1, 512, 4096, 65, 576, 512, 2000),
  }
  found.extend(_case(name, shape) for name, shape in edges.items())
  teacher = shapes.Shape(1, 4096, 32768, 64, 576, 512, 2048)
  found.append(_case("glm_5_teacher_32k", teacher, return_residuals=True))
  return found


def _case(name, shape, return_residuals=False):
  leading = (shape.batch, shape.num_queries)
  return Case(
    op="sparse_mla",
    name=name,
    function=functools.partial(
      pallas_kernels.sparse_mla,
      scale=0.05,
      value_dim=shape.value_dim,
      return_residuals=return_residuals,
      implementation="mosaic_gpu",
    ),
    arguments=[
      jax.ShapeDtypeStruct(
        (*leading, shape.heads, shape.latent_dim), jnp.bfloat16
      ),
      jax.ShapeDtypeStruct(
        (shape.batch, shape.num_keys, shape.latent_dim), jnp.bfloat16
      ),
      jax.ShapeDtypeStruct((*leading, shape.k), jnp.int32),
    ],
    temp_bytes=1 << 28,
    subset=name in _SUBSET,
  )
