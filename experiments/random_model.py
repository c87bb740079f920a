# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters of a model's shapes, made on the device, for timing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import indexcache_jax as ic


def random_params(config: ic.SparseTransformerConfig, seed: int = 0) -> dict:
  """Returns random parameters, array by array: no second copy is held.

  Norms are at their identity, all else is normal with `initializer_range`.
  """
  shapes = jax.eval_shape(
    ic.SparseTransformer(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
  )["params"]
  leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
  key = jax.random.key(seed)
  arrays = [
    _array(
      jax.random.fold_in(key, place),
      path[-1].key,
      leaf.shape,
      leaf.dtype,
      config.initializer_range,
    )
    for place, (path, leaf) in enumerate(leaves)
  ]
  return jax.tree_util.tree_unflatten(tree, arrays)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _array(key, name, shape, dtype, scale):
  if name == "scale":
    return jnp.ones(shape, dtype)
  if name in ("bias", "e_score_correction_bias"):
    return jnp.zeros(shape, dtype)
  # In the array's own dtype: float32 would double the largest.
  return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)


def expert_loads(
  config: ic.SparseTransformerConfig, params: dict, num_tokens: int = 4096
) -> np.ndarray:
  """Tokens of the fullest expert over the mean, for each layer of experts.

  A trained router with a load-balancing bias stays below about 2; 1 is even.
  """
  model = ic.SparseTransformer(config)
  tokens = jax.random.randint(
    jax.random.key(1), (1, num_tokens), 0, config.vocab_size
  )

  @jax.jit
  def counts(params, tokens):
    _, state = model.apply(
      {"params": params},
      tokens,
      logits_for="last",
      capture_intermediates=lambda module, _: module.name == "gate",
    )
    routings = [
      leaf
      for leaf in jax.tree.leaves(state["intermediates"])
      if leaf.dtype == jnp.int32
    ]
    return [
      jnp.bincount(experts.reshape(-1), length=config.n_routed_experts)
      for experts in routings
    ]

  loads = np.asarray(jax.device_get(counts(params, tokens)), np.float64)
  return loads.max(axis=1) / loads.mean(axis=1)


def random_cache(cache: ic.Cache, length: int, seed: int = 0) -> ic.Cache:
  """Fills a cache with `length` random tokens in each sequence."""

  @functools.partial(jax.jit, donate_argnums=(0,))
  def fill(cache, key):
    rows, tree = jax.tree.flatten((cache.kv_latent, cache.index_keys))
    keys = jax.random.split(key, len(rows))
    rows = [
      jax.random.normal(key, x.shape, x.dtype)
      for key, x in zip(keys, rows, strict=True)
    ]
    kv_latent, index_keys = jax.tree.unflatten(tree, rows)
    return cache.replace(
      kv_latent=kv_latent,
      index_keys=index_keys,
      lengths=jnp.full_like(cache.lengths, length),
    )

  return fill(cache, jax.random.key(seed))
