# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of `sparse_mla` at the shapes of real models."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.hopper import row_sums
from pallas_kernels.sparse_attention import shapes
from tests.gpu.cases import Case

_SHAPES = {
  **{name: s for name, s in shapes.SHAPES.items() if "decode" not in name},
  "glm_5_train_8k": shapes.Shape(2, 8192, 8192, 64, 576, 512, 2048),
  "glm_5_prefill_1m": shapes.Shape(1, 2048, 1048576, 64, 576, 512, 2048),
  "paper_train_8k": shapes.Shape(4, 8192, 8192, 8, 128, 96, 256),
  "one_query_one_row": shapes.Shape(1, 1, 1, 1, 64, 64, 1),
}


def _gradients(query, kv_latent, indices, grad, *, value_dim):
  _, vjp = jax.vjp(
    lambda query, kv_latent: pallas_kernels.sparse_mla(
      query,
      kv_latent,
      indices,
      scale=0.1,
      value_dim=value_dim,
      implementation="mosaic_gpu",
    ),
    query,
    kv_latent,
  )
  return vjp(grad)


def cases() -> list[Case]:
  """The table of shapes, training at 8K, and the least that there is."""
  return [_case(name, shape) for name, shape in _SHAPES.items()]


def _case(name, shape):
  batch, num_queries, num_keys, heads, width, value_dim, k = shape
  leading = (batch, num_queries)
  out = jax.ShapeDtypeStruct((*leading, heads, value_dim), jnp.bfloat16)
  padded_heads = heads + -heads % 8 if heads % 8 else 0
  # Queries, what comes out and its gradient, and the queries' gradient.
  padded_bytes = 4 * batch * num_queries * padded_heads * (width + value_dim)
  return Case(
    op="sparse_mla_backward",
    name=name,
    function=functools.partial(_gradients, value_dim=value_dim),
    arguments=[
      jax.ShapeDtypeStruct((*leading, heads, width), jnp.bfloat16),
      jax.ShapeDtypeStruct((batch, num_keys, width), jnp.bfloat16),
      jax.ShapeDtypeStruct((*leading, k), jnp.int32),
      out,
    ],
    # The sums of all rows in float32 exceed a GiB at a million keys.
    temp_bytes=max(
      1 << 30,
      4 * batch * num_keys * width + row_sums.CHUNK_BYTES + padded_bytes,
    ),
    subset=name in ("tiny", "glm_5_prefill_32k"),
  )
