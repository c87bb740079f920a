# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`sparse_mla` of real models: prefill and decode, 8K to 1M keys."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.sparse_attention import quantization, shapes
from tests.gpu.cases import Case

_HEADS = {"deepseek_v32": 128, "glm_5": 64, "glm_47_flash": 20}
_LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072, "1m": 1 << 20}
# Prefill and decoding, both kernels, both widths of values; odd sizes.
_QUANTIZED = {
  "prefill_128k": shapes.Shape(1, 4096, 131072, 64, 576, 512, 2048),
  "prefill_128k_20_heads": shapes.Shape(1, 4096, 131072, 20, 576, 512, 2048),
  "prefill_32k_128_heads": shapes.Shape(1, 4096, 32768, 128, 576, 512, 2048),
  "decode_of_1_128k": shapes.Shape(1, 1, 131072, 64, 576, 512, 2048),
  "decode_of_64_128k": shapes.Shape(64, 1, 131072, 64, 576, 512, 2048),
  "odd": shapes.Shape(3, 70, 1000, 33, 290, 256, 300),
}
_SUBSET = (
  "glm_5_prefill_32k",
  "glm_47_flash_prefill_128k",
  "glm_5_decode_of_8_128k",
  "float8_prefill_128k",
  "float8_decode_of_64_128k",
  "shared_rows_20_heads",
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
    "32_heads_32k": shapes.Shape(1, 4096, 32768, 32, 576, 512, 2048),
    "32_heads_128k": shapes.Shape(1, 4096, 131072, 32, 576, 512, 2048),
    "small_model": shapes.Shape(2, 512, 512, 8, 192, 128, 64),
    "no_rope": shapes.Shape(1, 512, 4096, 64, 512, 512, 2048),
    "odd_heads": shapes.Shape(1, 512, 4096, 65, 576, 512, 2000),
  }
  found.extend(_case(name, shape) for name, shape in edges.items())
  for name, shape in _QUANTIZED.items():
    found.append(_case(f"float8_{name}", shape, is_quantized=True))
  for heads in (20, 32, 8):
    shape = shapes.Shape(1, 4096, 131072, heads, 576, 512, 2048)
    found.append(_case(f"shared_rows_{heads}_heads", shape, shares_rows=True))
  found.append(
    _case(
      "float8_teacher_32k",
      shapes.Shape(1, 4096, 32768, 64, 576, 512, 2048),
      return_residuals=True,
      is_quantized=True,
    )
  )
  teacher = shapes.Shape(1, 4096, 32768, 64, 576, 512, 2048)
  found.append(_case("glm_5_teacher_32k", teacher, return_residuals=True))
  return found


def _latents(shape, is_quantized):
  leading = (shape.batch, shape.num_keys)
  if not is_quantized:
    return jax.ShapeDtypeStruct((*leading, shape.latent_dim), jnp.bfloat16)
  blocks = -(-shape.value_dim // quantization.BLOCK)
  rest = shape.latent_dim - shape.value_dim
  return pallas_kernels.QuantizedLatents(
    jax.ShapeDtypeStruct((*leading, shape.value_dim), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct((*leading, blocks), jnp.bfloat16),
    jax.ShapeDtypeStruct((*leading, rest), jnp.bfloat16),
  )


def _case(name, shape, is_quantized=False, **kwargs):
  leading = (shape.batch, shape.num_queries)
  return Case(
    op="sparse_mla",
    name=name,
    function=functools.partial(
      pallas_kernels.sparse_mla,
      scale=0.05,
      value_dim=shape.value_dim,
      implementation="mosaic_gpu",
      **kwargs,
    ),
    arguments=[
      jax.ShapeDtypeStruct(
        (*leading, shape.heads, shape.latent_dim), jnp.bfloat16
      ),
      _latents(shape, is_quantized),
      jax.ShapeDtypeStruct((*leading, shape.k), jnp.int32),
    ],
    temp_bytes=1 << 28,
    subset=name in _SUBSET,
  )
