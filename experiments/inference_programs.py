# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The two programs of a generation, lowered for shapes alone."""

import jax
import jax.numpy as jnp

import indexcache_jax as ic
from indexcache_jax import generation


def lower_prefill(
  config: ic.SparseTransformerConfig,
  params: dict,
  chunk_size: int,
  capacity: int,
) -> jax.stages.Lowered:
  """A chunk of one prompt."""
  return generation.extend.lower(
    ic.SparseTransformer(config),
    params,
    _int32(1, chunk_size),
    _int32(1),
    jax.eval_shape(lambda: ic.init_cache(config, 1, capacity)),
  )


def lower_decoding(
  config: ic.SparseTransformerConfig, params: dict, batch: int, capacity: int
) -> jax.stages.Lowered:
  """A block of decoding for `batch` requests with caches of `capacity`."""
  state = generation.DecodeState(
    jax.ShapeDtypeStruct((batch, config.vocab_size), jnp.float32),
    jax.eval_shape(lambda: ic.init_cache(config, batch, capacity)),
    jax.ShapeDtypeStruct((batch,), bool),
    _int32(),
  )
  return generation.decode_block.lower(
    ic.SparseTransformer(config),
    params,
    state,
    jax.random.key(0),
    None,
    _int32(0),
    _int32(),
  )


def _int32(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.int32)
