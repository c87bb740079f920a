# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The indexer of DeepSeek-V3.2, GLM-5 and the 30B model."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.indexer import mosaic_tpu, shapes
from tests.tpu.cases import Case

_SUBSET = ("glm_5_decode_128k", "deepseek_v32_prefill_32k", "tiny")


def cases() -> list[Case]:
  """`indexer_topk` at the table of shapes; the costs of its scores."""
  table = {
    **shapes.SHAPES,
    # The 30B model has the indexer of GLM-5 (kernel notes: 32 heads).
    "glm_5_prefill_8k": shapes.Shape(1, 4096, 8192, 32, 128, 2048),
    "glm_5_prefill_1m": shapes.Shape(1, 4096, 1048576, 32, 128, 2048),
    "deepseek_v32_prefill_8k": shapes.Shape(1, 4096, 8192, 64, 128, 2048),
    "deepseek_v32_decode_128k": shapes.Shape(8, 1, 131072, 64, 128, 2048),
    "deepseek_v32_decode_1m": shapes.Shape(1, 1, 1048576, 64, 128, 2048),
    "deepseek_v32_draft_128k": shapes.Shape(8, 3, 131072, 64, 128, 2048),
  }
  found = [_topk(name, shape) for name, shape in table.items()]
  shape = shapes.Shape(1, 256, 8192, 32, 128, 2048)
  found.append(_topk("float32_8k", shape, jnp.float32))
  found.append(
    _topk(
      "float8_8k",
      shape,
      jnp.float8_e4m3fn,
      # Their matrix units have no float8_e4m3fn.
      rejected_on=("v5e", "v5p", "v6e"),
    )
  )
  # Few blocks show the cost of any number.
  for name, shape in (
    ("scores_64_heads", shapes.Shape(1, 256, 4096, 64, 128, 0)),
    ("scores_32_heads", shapes.Shape(1, 256, 4096, 32, 128, 0)),
    ("scores_decode_64_heads", shapes.Shape(2, 1, 65536, 64, 128, 0)),
    ("scores_decode_32_heads", shapes.Shape(2, 1, 65536, 32, 128, 0)),
  ):
    found.append(_scores(name, shape))
  return found


def _arguments(shape, dtype=jnp.bfloat16):
  batch, queries, keys, heads, dim, _ = shape
  return [
    jax.ShapeDtypeStruct(dims, dtype)
    for dims, dtype in (
      ((batch, queries, heads, dim), dtype),
      ((batch, keys, dim), dtype),
      ((batch, queries, heads), jnp.float32),
      ((batch, queries), jnp.int32),
      ((batch, queries), jnp.int32),
    )
  ]


def _topk(name, shape, dtype=jnp.bfloat16, rejected_on=()):
  arguments = _arguments(shape, dtype)
  return Case(
    op="indexer",
    name=name,
    function=functools.partial(
      pallas_kernels.indexer_topk, k=shape.k, implementation="mosaic_tpu"
    ),
    arguments=arguments,
    cache=arguments[1]
    if shape.num_keys > shape.heads * shape.num_queries
    else None,
    subset=name in _SUBSET,
    rejected_on=rejected_on,
  )


def _scores(name, shape):
  def every_key(index_q, index_k, index_weights):
    """All keys visible: the profiler reads no argument's values."""
    queries = index_q.shape[:2]
    return mosaic_tpu.indexer_scores(
      index_q,
      index_k,
      index_weights,
      jnp.zeros(queries, jnp.int32),
      jnp.full(queries, index_k.shape[1], jnp.int32),
      skip=False,
    )

  arguments = _arguments(shape)[:3]
  moved = sum(x.size * x.dtype.itemsize for x in arguments)
  pairs = shape.batch * shape.num_queries * shape.num_keys
  return Case(
    op="indexer",
    name=name,
    function=every_key,
    arguments=arguments,
    cost=True,
    kernels=("indexer_scores",),
    hbm_bytes=moved + 4 * pairs,
    contraction=shape.dim,
    mxu_flops=2 * shape.heads * shape.dim * pairs,
    note=f"{shape.num_queries} queries x {shape.num_keys} keys",
  )
