# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole models with the kernels inside: a forward pass and a decode step."""

from unittest import mock

import jax
import jax.numpy as jnp

from indexcache_jax import cache as cache_lib
from indexcache_jax import model as model_lib
from indexcache_jax import presets, sharding
from pallas_kernels import packing
from tests.tpu.cases import Case

_KERNELS = ("indexer_scores", "top_k", "sparse_mla")


def cases() -> list[Case]:
  """`tiny`, and one layer of `glm_5_2`, on one chip and on four."""
  tiny = presets.tiny().replace(dtype=jnp.bfloat16)
  # Layer 0 as it is, with a dense MLP: 256 experts do not fit one v5e.
  layer = presets.glm_5_2().replace(num_hidden_layers=1)
  return [
    case
    for num_chips in (1, 4)
    for case in (
      _forward("tiny", tiny, 8, 64, num_chips),
      _decode("tiny", tiny, 8, 64, num_chips),
      _forward("glm_5_2", layer, 1, 8192, num_chips),
      _decode("glm_5_2", layer, 8, 131072, num_chips),
    )
  ]


def _forward(name, config, batch, length, num_chips):
  model, params = _model(config)

  def forward(params, tokens):
    logits, _ = model.apply({"params": params}, tokens, logits_for="last")
    return logits

  return Case(
    op="model",
    name=f"{name}_forward_{num_chips}_chips",
    function=forward,
    arguments=[params, jax.ShapeDtypeStruct((batch, length), jnp.int32)],
    kernels=_KERNELS,
    temp_bytes=4 << 30,
    num_chips=num_chips,
    shardings=_shardings,
  )


def _decode(name, config, batch, capacity, num_chips):
  model, params = _model(config)
  with mock.patch.object(packing, "is_preferred", return_value=True):
    cache = jax.eval_shape(
      lambda: cache_lib.init_cache(config, batch, capacity)
    )

  def step(params, tokens, cache):
    logits, aux = model.apply({"params": params}, tokens, cache=cache)
    return logits, aux.cache

  words = cache.kv_latent[0].words
  # A chip of 7x is two devices, and a device has the rows of one sequence.
  rows = 1 if num_chips > 1 else batch
  return Case(
    op="model",
    name=f"{name}_decode_{num_chips}_chips",
    function=step,
    arguments=[params, jax.ShapeDtypeStruct((batch, 1), jnp.int32), cache],
    donated=(2,),
    kernels=_KERNELS,
    # On 7x the head's part changes its layout: 227 MiB.
    temp_bytes=1 << 28,
    cache=jax.ShapeDtypeStruct((rows, *words.shape[1:]), words.dtype),
    num_chips=num_chips,
    shardings=_shardings,
    subset=name == "tiny" and num_chips == 4,
  )


def _model(config):
  # Named, so that a refusal is an error and not XLA's turn.
  model = model_lib.SparseTransformer(
    config.replace(implementation="mosaic_tpu")
  )
  plain = model_lib.SparseTransformer(config.replace(implementation="xla"))
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  params = jax.eval_shape(plain.init, jax.random.key(0), tokens)["params"]
  return model, params


def _shardings(arguments, devices):
  """Parameters split as `load_checkpoint` may; sequences and caches by row."""
  params, *by_row = arguments
  split = sharding.parameter_shardings(params, devices)
  mesh = jax.tree.leaves(split)[0].mesh

  def split_rows(x):
    axis = None if x.shape[0] % len(devices) else "devices"
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis))

  return [split, *jax.tree.map(split_rows, by_row)]
