# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The tiny model with non-trivial parameters, shared by the tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import indexcache_jax as ic

LENGTH = 40  # Five times index_topk.


def config(pattern="FFFF", **changes):
  return ic.PRESETS["tiny"]().replace(
    schedule=ic.ReuseSchedule.from_pattern(pattern), **changes
  )


@functools.lru_cache
def full_params():
  """Random parameters, norms and biases away from their trivial values."""
  # Drawn with NumPy over the shapes: compiling `init` takes 20 seconds.
  shapes = jax.eval_shape(
    ic.SparseTransformer(config()).init,
    jax.random.key(0),
    jnp.zeros((1, 2), jnp.int32),
  )["params"]
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    spread = 0.1 if leaf.ndim == 1 else config().initializer_range
    centre = 1.0 if path[-1] == "scale" else 0.0
    return jnp.asarray(
      centre + spread * rng.normal(size=leaf.shape), leaf.dtype
    )

  return traverse_util.path_aware_map(draw, shapes)


def params_for(config):
  """The full model's parameters without the indexers of shared layers."""
  params = jax.tree.map(lambda x: x, full_params())
  for layer in range(config.num_hidden_layers):
    if not config.schedule.is_full(layer):
      del params[f"layers_{layer}"]["self_attn"]["indexer"]
  return params


def random_tokens(batch=2, length=LENGTH, seed=0):
  return jax.random.randint(
    jax.random.key(seed), (batch, length), 0, 64, jnp.int32
  )


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("kind",))
def forward(config, params, tokens, kind="sparse", **kwargs):
  return ic.SparseTransformer(config).apply(
    {"params": params}, tokens, attention_kind=kind, **kwargs
  )
