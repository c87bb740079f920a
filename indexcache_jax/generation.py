# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Prefill in chunks, decode with the cache, greedy or sampled."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from indexcache_jax import cache as cache_lib
from indexcache_jax import config as config_lib
from indexcache_jax import model as model_lib
from indexcache_jax import types


class PrefillResult(NamedTuple):
  """Logits after each row's last real token, and the filled cache."""

  logits: Float32[Array, "B vocab"]
  cache: cache_lib.Cache


def prefill(
  model: model_lib.SparseTransformer,
  params: dict,
  tokens: types.Tokens,
  lengths: Int[Array, " B"] | Int[np.ndarray, " B"],
  cache: cache_lib.Cache,
  *,
  chunk_size: int | None = None,
) -> PrefillResult:
  """Appends right-padded sequences to a cache, a chunk at a time.

  Args:
    model: of the parameters.
    params: its parameters.
    tokens: padded at the right.
    lengths: real tokens of each row, at least 1.
    cache: of sufficient capacity for the padded tokens.
    chunk_size: tokens of a chunk; activations are linear in it, and equal
      chunks share one compilation. None: all at once.

  Returns:
    Next-token logits of every row, and the cache. The numbers are those of
    one pass over everything.
  """
  size = tokens.shape[1] if chunk_size is None else chunk_size
  if size < 1:
    raise ValueError(f"`chunk_size` must be at least 1: got {chunk_size}.")
  if tokens.shape[1] > cache.capacity:
    raise ValueError(
      "`tokens` must fit in `cache`: got"
      f" {tokens.shape[1]} tokens for a capacity of {cache.capacity}. Make"
      " the cache larger with `init_cache`."
    )
  lengths = np.asarray(lengths, np.int32)
  if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
    raise ValueError(
      f"`lengths` must be from 1 to the {tokens.shape[1]} tokens of a row: got"
      f" {lengths.tolist()}."
    )
  logits = None
  for start in range(0, tokens.shape[1], size):
    in_chunk = jnp.asarray(np.clip(lengths - start, 0, size))
    new_logits, cache = _extend(
      model, params, tokens[:, start : start + size], in_chunk, cache
    )
    # A row ends in exactly one chunk; it has no logits in a later one.
    is_here = (in_chunk > 0)[:, None]
    logits = (
      new_logits if logits is None else (jnp.where(is_here, new_logits, logits))
    )
  return PrefillResult(logits, cache)


def generate(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  seed: int = 0,
  chunk_size: int | None = None,
) -> Int32[np.ndarray, "B new"]:
  """Continues prompts of any lengths under `config.schedule`.

  Args:
    config: of the model.
    params: its parameters.
    prompts: token ids of each sequence, at least one token each.
    max_new_tokens: tokens to add to each.
    temperature: 0 takes the likeliest token; else samples at it.
    seed: of the sampling.
    chunk_size: tokens of a prefill chunk, see `prefill`.

  Returns:
    The new tokens of each prompt.
  """
  _check_prompts(config, prompts, max_new_tokens, temperature)
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  model = model_lib.SparseTransformer(config)
  cache = cache_lib.init_cache(
    config, len(prompts), tokens.shape[1] + max_new_tokens
  )
  logits, cache = prefill(
    model,
    params,
    jnp.asarray(tokens),
    lengths,
    cache,
    chunk_size=chunk_size,
  )
  tokens, _ = _decode(
    model,
    params,
    logits,
    cache,
    jax.random.key(seed),
    float(temperature),
    max_new_tokens,
  )
  return np.asarray(tokens)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(4,))
def _extend(model, params, tokens, lengths, cache):
  logits, aux = model.apply(
    {"params": params},
    tokens,
    lengths=lengths,
    cache=cache,
    logits_for="last",
  )
  return logits[:, 0], aux.cache


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=(3,))
def _decode(model, params, logits, cache, key, temperature, num_tokens):
  def step(carry, key):
    logits, cache = carry
    if temperature == 0:
      token = jnp.argmax(logits, axis=-1)
    else:
      token = jax.random.categorical(key, logits / temperature)
    token = token.astype(jnp.int32)
    logits, aux = model.apply({"params": params}, token[:, None], cache=cache)
    return (logits[:, 0], aux.cache), token

  keys = jax.random.split(key, num_tokens)
  (_, cache), tokens = jax.lax.scan(step, (logits, cache), keys)
  # The cache is returned so that its donated memory is the loop's.
  return tokens.T, cache


def _check_prompts(config, prompts, max_new_tokens, temperature):
  if not len(prompts) or not all(len(prompt) for prompt in prompts):
    raise ValueError(
      "`prompts` must be one or more sequences of at least one token: got"
      f" lengths {[len(prompt) for prompt in prompts]}."
    )
  if max_new_tokens < 1:
    raise ValueError(
      f"`max_new_tokens` must be at least 1: got {max_new_tokens}."
    )
  if not temperature >= 0:  # True for NaN too.
    raise ValueError(
      "`temperature` must be 0 (likeliest token) or positive: got"
      f" {temperature}."
    )
  arrays = [np.asarray(prompt) for prompt in prompts]
  for place, array in enumerate(arrays):
    if array.ndim != 1 or array.dtype.kind not in "iu":
      raise ValueError(
        "`prompts` must hold token ids, a flat list of integers each: got"
        f" {array.dtype} of shape {array.shape} as prompt {place}."
      )
  highest = max(int(array.max()) for array in arrays)
  lowest = min(int(array.min()) for array in arrays)
  if lowest < 0 or highest >= config.vocab_size:
    raise ValueError(
      "`prompts` must hold token ids below `vocab_size`: got ids from"
      f" {lowest} to {highest} for vocab_size={config.vocab_size}."
    )
