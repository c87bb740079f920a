# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters of a model's shapes, made on the device, for timing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import indexcache_jax as ic
from indexcache_jax import attention, decoder

# Of a correction bias; scores are sigmoids, from 0 to 1.
_FIRST_STEP = 0.05


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


def balance_experts(
  config: ic.SparseTransformerConfig,
  params: dict,
  *,
  num_tokens: int,
  num_steps: int = 50,
) -> tuple[dict, np.ndarray]:
  """Sets the routers' correction biases so that experts share the tokens.

  Random routers send most tokens to few experts, for the hidden states of a
  random model have much in common. The biases are moved as DeepSeek-V3 moves
  them in training (arXiv 2412.19437, section 2.1.2): up for an expert below
  the mean load, down above, in steps that shrink. Layer after layer, for a bias
  changes what later layers see: one compiled layer serves all of its kind.

  Args:
    config: of the model; with experts. Every layer runs its indexer.
    params: of `random_params`, for all layers full.
    num_tokens: random tokens that are routed.
    num_steps: passes through each layer.

  Returns:
    Parameters, and for each layer of experts the tokens of its fullest expert
    over the mean. A trained router stays below about 2; 1 is even.
  """
  tokens = jax.random.randint(
    jax.random.key(1), (1, num_tokens), 0, config.vocab_size
  )
  context = attention.make_context(config, tokens)
  hidden = ic.SparseTransformer(config).apply(
    {"params": params}, tokens, method="embed"
  )
  balanced, fullest = dict(params), []
  for layer in range(config.num_hidden_layers):
    name = f"layers_{layer}"
    use_experts = config.is_sparse_mlp(layer)
    block = decoder.DecoderLayer(config, use_experts=use_experts)
    if use_experts:
      balanced[name], load = _balance_layer(
        block, params[name], hidden, context, num_steps
      )
      fullest.append(load)
    hidden = _run_layer(block, balanced[name], hidden, context)
  return balanced, np.asarray(fullest, np.float64)


def _balance_layer(block, params, hidden, context, num_steps):
  """A layer's parameters with its bias moved, and its fullest expert's load."""
  bias = jnp.zeros((block.config.n_routed_experts,), jnp.float32)
  for step in range(num_steps):
    loads = _loads(block, params, bias, hidden, context)
    bias += _FIRST_STEP * 0.93**step * jnp.clip(1 - loads, -1, 1)
  fullest = float(_loads(block, params, bias, hidden, context).max())
  return _with_bias(params, bias), fullest


@functools.partial(jax.jit, static_argnums=(0,))
def _loads(block, params, bias, hidden, context):
  """Load of each expert over the mean."""
  config = block.config
  _, state = block.apply(
    {"params": _with_bias(params, bias)},
    hidden,
    context,
    capture_intermediates=lambda module, _: module.name == "gate",
  )
  [routing] = state["intermediates"]["mlp"]["gate"]["__call__"]
  experts = routing.experts.reshape(-1)
  counts = jnp.bincount(experts, length=config.n_routed_experts)
  return counts * config.n_routed_experts / experts.size


@functools.partial(jax.jit, static_argnums=(0,))
def _run_layer(block, params, hidden, context):
  return block.apply({"params": params}, hidden, context)[0]


def _with_bias(params, bias):
  """A layer's parameters with another correction bias."""
  gate = {**params["mlp"]["gate"], "e_score_correction_bias": bias}
  return {**params, "mlp": {**params["mlp"], "gate": gate}}


def random_cache(
  config: ic.SparseTransformerConfig,
  batch_size: int,
  capacity: int,
  length: int,
  seed: int = 0,
) -> ic.Cache:
  """Returns a cache that holds `length` random tokens a sequence.

  Made array by array, and never beside an empty one of the same size: XLA
  compiled one program for the arrays of 47 layers for minutes.

  Raises:
    ValueError: as `init_cache`.
  """
  shapes = jax.eval_shape(lambda: ic.init_cache(config, batch_size, capacity))
  rows, tree = jax.tree.flatten((shapes.kv_latent, shapes.index_keys))
  key = jax.random.key(seed)
  rows = [
    _normal_rows(jax.random.fold_in(key, place), one.shape, one.dtype)
    for place, one in enumerate(rows)
  ]
  kv_latent, index_keys = jax.tree.unflatten(tree, rows)
  return ic.Cache(
    kv_latent=kv_latent,
    index_keys=index_keys,
    index_key_scales=tuple(
      jnp.ones(one.shape, one.dtype) for one in shapes.index_key_scales
    ),
    lengths=jnp.full((batch_size,), length, jnp.int32),
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal_rows(key, shape, dtype):
  """Normal numbers; a packed cache has two of bfloat16 a word."""
  if dtype == jnp.uint32:
    halves = jax.random.normal(key, (*shape, 2), jnp.bfloat16)
    return jax.lax.bitcast_convert_type(halves, jnp.uint32)
  return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
