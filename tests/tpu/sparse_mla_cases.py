# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`sparse_mla` of DeepSeek-V3.2, GLM-5 and GLM-4.7-Flash, packed caches."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels import tpu
from pallas_kernels.sparse_attention import (
  mosaic_tpu,
  mosaic_tpu_backward,
  packing,
  shapes,
)
from pallas_kernels.sparse_attention import (
  mosaic_tpu_backward_kernel as backward_kernel,
)
from pallas_kernels.sparse_attention import mosaic_tpu_gather as gather
from tests.tpu.cases import Case

_HEADS = {"deepseek_v32": 128, "glm_5": 64, "glm_47_flash": 20}
_KEYS = {"8k": 8192, "128k": 131072, "1m": 1048576}
# XLA gives `query` a layout of its own and copies it, as a model's graph would
# not; that array is kept smaller than the cache, whose copies are a fault.
_PREFILL_QUERIES = {"8k": 32, "128k": 512, "1m": 4096}
_SUBSET = ("deepseek_v32_prefill_128k", "glm_47_flash_decode_1m", "tiny")
# Scalar work on one row: load its number, shift it, add the base, make and
# shift the destination, two operations a bundle; the copy fills one alone.
_BUNDLES_A_ROW = 3.5
_SCALE = 0.07
# `topk_indices` as rows of words and in the layouts that kernels read.
_INDEX_COPIES = 3


def cases() -> list[Case]:
  """Every model, phase and length; few queries of each, to be costed."""
  found = []
  glm = shapes.SHAPES["glm_5_prefill_32k"]
  for model, heads in _HEADS.items():
    for length, keys in _KEYS.items():
      for phase, (batch, queries) in {
        "prefill": (1, _PREFILL_QUERIES[length]),
        "decode": (8, 1),
      }.items():
        shape = shapes.Shape(batch, queries, keys, heads, 576, 512, 2048)
        found.append(_packed(f"{model}_{phase}_{length}", shape))
    for phase, (batch, queries) in {
      "prefill_of_8": (1, 8),
      "decode_of_8": (8, 1),
      "decode_of_1": (1, 1),
    }.items():
      shape = shapes.Shape(batch, queries, 131072, heads, 576, 512, 2048)
      found.append(_packed(f"{model}_{phase}", shape, cost=True))
    # What distillation asks for.
    shape = shapes.Shape(1, 8, 131072, heads, 576, 512, 2048)
    name = f"{model}_mean_probs_of_8"
    found.append(_packed(name, shape, cost=True, with_mean_probs=True))
    shape = glm._replace(heads=heads, num_queries=4)
    found.append(_backward_kernel(f"{model}_backward_of_4", shape))
  tiny = shapes.SHAPES["tiny"]
  found.append(_packed("tiny", tiny))
  found.append(_packed("tiny_float32", tiny, jnp.float32))
  short = glm._replace(num_queries=_PREFILL_QUERIES["128k"], num_keys=131072)
  found.append(_packed("glm_5_float32", short, jnp.float32))
  found.append(_plain("glm_5_packed_each_call", glm))
  for model, heads in _HEADS.items():
    found.append(_backward(f"{model}_backward_32k", glm._replace(heads=heads)))
  found.append(_backward("tiny_backward", tiny))
  found.append(_backward("tiny_backward_float32", tiny, jnp.float32))
  return found


def _arguments(shape, dtype):
  return (
    jax.ShapeDtypeStruct(
      (shape.batch, shape.num_queries, shape.heads, shape.latent_dim), dtype
    ),
    jax.ShapeDtypeStruct(
      (shape.batch, shape.num_keys, shape.latent_dim), dtype
    ),
    jax.ShapeDtypeStruct((shape.batch, shape.num_queries, shape.k), jnp.int32),
  )


def _without_semaphore_checks(function):
  """For the profiler: in what the kernel does at its end, that of 7x overflows.

  There the kernel reads every semaphore, and stops the chip if one is not zero.
  """

  def unchecked(*args):
    params = functools.partial(
      pltpu.CompilerParams, disable_semaphore_checks=True
    )
    with mock.patch.object(pltpu, "CompilerParams", params):
      return function(*args)

  return unchecked


def _packed(name, shape, dtype=jnp.bfloat16, cost=False, with_mean_probs=False):
  query, latent, indices = _arguments(shape, dtype)
  packed = jax.eval_shape(packing.pack, latent)

  def function(query, words, indices):
    return mosaic_tpu.sparse_mla_packed(
      query,
      packing.PackedLatent(
        words=words,
        num_keys=packed.num_keys,
        width=packed.width,
        dtype=packed.dtype,
      ),
      indices,
      scale=_SCALE,
      value_dim=shape.value_dim,
      with_mean_probs=with_mean_probs,
    )

  queries = shape.batch * shape.num_queries
  rows = queries * shape.k
  width = shape.latent_dim
  return Case(
    op="sparse_mla",
    name=name,
    function=_without_semaphore_checks(function) if cost else function,
    arguments=[query, packed.words, indices],
    temp_bytes=_temp_bytes(shape, query.dtype.itemsize),
    cache=packed.words,
    subset=name in _SUBSET,
    cost=cost,
    kernels=("sparse_mla",),
    hbm_bytes=rows * (width * query.dtype.itemsize + 4)
    + queries * shape.heads * (width + shape.value_dim) * 2,
    mxu_flops=2 * rows * shape.heads * (width + shape.value_dim),
    issue_cycles=round(rows * _BUNDLES_A_ROW),
    note="with mean probabilities"
    if with_mean_probs
    else "nothing to overlap the ends with"
    if "decode_of_1" in name
    else "",
  )


def _temp_bytes(shape, itemsize):
  queries = shape.batch * shape.num_queries
  # In whole tiles: one copy of the query and of the output, none of the cache.
  columns = -(-shape.latent_dim // 128) * 128 + shape.value_dim
  heads = -(-shape.heads // 16) * 16
  copies = queries * heads * columns * itemsize
  return copies + 4 * _INDEX_COPIES * queries * max(shape.k, 128) + (1 << 20)


def _plain(name, shape):
  """The drop-in entry, whose temporary memory holds the packed cache."""
  return Case(
    op="sparse_mla",
    name=name,
    function=functools.partial(
      pallas_kernels.sparse_mla,
      scale=_SCALE,
      value_dim=shape.value_dim,
      implementation="mosaic_tpu",
    ),
    arguments=_arguments(shape, jnp.bfloat16),
    note="packs the cache: a copy a call",
  )


def _backward(name, shape, dtype=jnp.bfloat16):
  """A whole call; `_backward_kernel` is costed."""
  query, latent, indices = _arguments(shape, dtype)
  per_query = query.shape[:3]
  out = jax.ShapeDtypeStruct((*per_query, shape.value_dim), dtype)
  log_sum_exp = jax.ShapeDtypeStruct(per_query, jnp.float32)
  width, itemsize = shape.latent_dim, query.dtype.itemsize
  # Sums of two cores and packed rows; copies of the arguments and of the
  # result, cut into parts; the padded arrays of a part.
  tokens = shape.batch * (shape.num_keys + 512)
  queries = shape.batch * shape.num_queries
  copies = queries * shape.heads * (2 * width + 2 * shape.value_dim) * itemsize
  return Case(
    op="sparse_mla",
    name=name,
    function=functools.partial(
      mosaic_tpu_backward.sparse_mla_backward, scale=_SCALE
    ),
    arguments=(query, latent, indices, out, log_sum_exp, out, log_sum_exp),
    temp_bytes=tokens * width * (2 * 6 + 2 * itemsize) + copies + (10 << 27),
    subset=name == "tiny_backward",
    kernels=("sparse_mla_backward",),
  )


def _backward_kernel(name, shape):
  """The kernel alone: what a call does once is small beside many queries."""
  queries, count = shape.num_queries, shape.k
  dtype = jnp.dtype(jnp.bfloat16)
  row_tiles = packing.row_tiles(shape.latent_dim, dtype)
  columns = backward_kernel.columns(row_tiles, dtype)
  heads = -(-shape.heads // 16) * 16
  struct = jax.ShapeDtypeStruct
  num_words = packing.num_rows(shape.num_keys + 512, shape.latent_dim, dtype)

  def function(*arrays):
    tiles = mosaic_tpu_backward.default_tiles(queries, count, tpu.chip())
    num_chunks = count // tiles.chunk
    problem = gather.Problem(
      heads=heads,
      value_dim=shape.value_dim,
      row_tiles=row_tiles,
      num_chunks=num_chunks,
      steps=queries // tiles.cores * num_chunks,
      tiles=tiles,
      scale=_SCALE,
      dtype=dtype,
    )
    *arrays, sums = arrays
    return backward_kernel.call(
      problem, *arrays, sums.reshape(tiles.cores, -1, 128)
    )

  rows = queries * count
  width, value_dim = shape.latent_dim, shape.value_dim
  array = struct((queries, heads, columns), dtype)
  by_head = struct((queries, 1, 128), jnp.float32)
  indices = struct((queries, count), jnp.int32)
  return Case(
    op="sparse_mla",
    name=name,
    function=_without_semaphore_checks(function),
    arguments=(
      *(array, array, by_head, by_head, indices, indices),
      struct((num_words, 128), jnp.uint32),
      # Of as many cores as there may be.
      struct((2, 2 * num_words, 128), jnp.float32),
    ),
    donated=(7,),
    cost=True,
    kernels=("sparse_mla_backward",),
    # A row, and its sum in and out in float32.
    hbm_bytes=rows * (width * (2 + 4 + 4) + 4)
    + queries * shape.heads * (2 * width + value_dim) * 2,
    mxu_flops=2 * rows * shape.heads * (3 * width + 2 * value_dim),
    issue_cycles=round(3 * rows * _BUNDLES_A_ROW),
    note="the kernel alone",
  )
