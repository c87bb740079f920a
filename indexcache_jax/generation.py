# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Prefill in chunks, decode with the cache, greedy or sampled.

Two compiled programs serve a generation of any length: one for a chunk of the
prompt, one for a block of new tokens, whose loop runs on the device.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float32, Int, Int32

from indexcache_jax import cache as cache_lib
from indexcache_jax import config as config_lib
from indexcache_jax import model as model_lib
from indexcache_jax import types

# New tokens of one call of the device's loop; Ctrl-C is heard between two.
_BLOCK = 32
# Stands behind a row's stop token.
NO_TOKEN = -1


class PrefillResult(NamedTuple):
  """Logits after each row's last real token, and the filled cache."""

  logits: Float32[Array, "B vocab"]
  cache: cache_lib.Cache


def prefill(
  model: model_lib.SparseTransformer,
  params: dict,
  tokens: types.Tokens | Int32[np.ndarray, "B T"],
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
    cache: of as many rows, with room for `lengths` behind what it holds.
    chunk_size: tokens of a chunk, cut to the cache's capacity; activations are
      linear in it. The last chunk is padded, so that one compilation serves
      all lengths of prompts. None: all at once.

  Returns:
    Next-token logits of every row, and the cache. The numbers are those of
    one pass over everything.

  Raises:
    ValueError: lengths or token ids out of their range, or more tokens than
      the cache has room for.
  """
  # On the host: slices there start no program of their own.
  tokens = np.asarray(tokens)
  lengths = np.asarray(lengths, np.int32)
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"`chunk_size` must be at least 1: got {chunk_size}.")
  _check_rows(model.config, tokens, lengths, cache)
  tokens = tokens[:, : lengths.max()]
  size = tokens.shape[1]
  if chunk_size is not None:
    size = min(chunk_size, cache.capacity)
  tokens = np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % size)))
  logits = None
  for start in range(0, lengths.max(), size):
    in_chunk = jnp.asarray(np.clip(lengths - start, 0, size))
    new_logits, cache = extend(
      model,
      params,
      jnp.asarray(tokens[:, start : start + size]),
      in_chunk,
      cache,
    )
    # A row ends in exactly one chunk; it has no logits in a later one.
    is_here = (in_chunk > 0)[:, None]
    logits = (
      new_logits if logits is None else (jnp.where(is_here, new_logits, logits))
    )
  return PrefillResult(logits, cache)


class Sampling(NamedTuple):
  """How a token is drawn.

  Attributes:
    temperature: divides the logits.
    top_p: only the likeliest tokens that together reach this probability.
  """

  temperature: float
  top_p: float


def generate(
  config: config_lib.SparseTransformerConfig,
  params: dict,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_p: float = 1.0,
  stop_tokens: Sequence[int] = (),
  seed: int = 0,
  chunk_size: int | None = None,
  capacity: int | None = None,
) -> Int32[np.ndarray, "B new"]:
  """Continues prompts of any lengths under `config.schedule`.

  Ctrl-C during decoding ends the generation, and what there is is returned.

  Args:
    config: of the model.
    params: its parameters.
    prompts: token ids of each sequence, at least one token each.
    max_new_tokens: tokens to add to each, at most.
    temperature: 0 takes the likeliest token; else samples at it.
    top_p: samples from the likeliest tokens that together have this
      probability; 1: from all.
    stop_tokens: each ends the row in which it is drawn.
    seed: of the sampling; a row's draws do not depend on how far others go.
    chunk_size: tokens of a prefill chunk, see `prefill`.
    capacity: tokens of the cache, for the longest prompt and `max_new_tokens`.
      With it and a chunk size, as many prompts of whatever lengths share two
      compiled programs. None: as many as these prompts need.

  Returns:
    The new tokens of each prompt, a stop token included; -1 behind it.

  Raises:
    ValueError: an argument out of its range, or a cache that does not fit in
      the device's memory.
  """
  _check_prompts(config, prompts, max_new_tokens)
  _check_sampling(config, temperature, top_p, stop_tokens)
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  model = model_lib.SparseTransformer(config)
  needed = tokens.shape[1] + max_new_tokens
  if capacity is not None and capacity < needed:
    raise ValueError(
      "`capacity` must hold the longest prompt and `max_new_tokens`: got"
      f" capacity={capacity} for {tokens.shape[1]} + {max_new_tokens} tokens."
      " Make it larger, or shorten the prompt."
    )
  cache = cache_lib.init_cache(config, len(prompts), capacity or needed)
  logits, cache = prefill(
    model, params, tokens, lengths, cache, chunk_size=chunk_size
  )
  state = DecodeState(
    logits, cache, jnp.zeros(len(prompts), bool), jnp.int32(0)
  )
  sampling = Sampling(temperature, top_p) if temperature else None
  blocks = []
  try:
    for begin in range(0, max_new_tokens, _BLOCK):
      limit = min(_BLOCK, max_new_tokens - begin)
      state, block = decode_block(
        model,
        params,
        state,
        jax.random.key(seed),
        sampling,
        jnp.asarray(stop_tokens, jnp.int32),
        jnp.int32(limit),
      )
      blocks.append(np.asarray(block)[:, :limit])
      if np.all(state.is_done):
        break
  except KeyboardInterrupt:
    logging.warning(
      "Interrupted: %d of %d new tokens are returned.",
      sum(block.shape[1] for block in blocks),
      max_new_tokens,
    )
  new_tokens = np.full((len(prompts), max_new_tokens), NO_TOKEN, np.int32)
  if blocks:
    found = np.concatenate(blocks, axis=1)
    new_tokens[:, : found.shape[1]] = found
  return new_tokens


class DecodeState(NamedTuple):
  """What one new token hands to the next.

  Attributes:
    logits: of the token to draw.
    cache: of all tokens before it.
    is_done: rows that have drawn a stop token.
    step: new tokens so far.
  """

  logits: Float32[Array, "B vocab"]
  cache: cache_lib.Cache
  is_done: Bool[Array, " B"]
  step: Int32[Array, ""]


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(4,))
def extend(
  model: model_lib.SparseTransformer,
  params: dict,
  tokens: types.Tokens,
  lengths: Int32[Array, " B"],
  cache: cache_lib.Cache,
) -> tuple[Float32[Array, "B vocab"], cache_lib.Cache]:
  """Appends one chunk of right-padded tokens; `prefill` checks its arguments.

  Args:
    model: of the parameters.
    params: its parameters.
    tokens: of the chunk.
    lengths: real tokens of each row, 0 where the row has ended.
    cache: its memory is taken over.

  Returns:
    Logits after each row's last real token, and the cache.
  """
  logits, aux = model.apply(
    {"params": params},
    tokens,
    lengths=lengths,
    cache=cache,
    logits_for="last",
  )
  return logits[:, 0], aux.cache


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def decode_block(
  model: model_lib.SparseTransformer,
  params: dict,
  state: DecodeState,
  key: jax.Array,
  sampling: Sampling | None,
  stop_tokens: Int32[Array, " stop"],
  limit: Int32[Array, ""],
) -> tuple[DecodeState, Int32[Array, "B block"]]:
  """Draws up to 32 tokens a row, in a loop on the device.

  Args:
    model: of the parameters.
    params: its parameters.
    state: after the prompt or the block before; its memory is taken over. Its
      cache must have room for `limit` tokens: a row that has none is dropped.
    key: of the whole generation.
    sampling: None for the likeliest token.
    stop_tokens: each ends its row.
    limit: tokens to draw.

  Returns:
    The state, and the tokens, -1 where none was drawn.
  """
  num_rows = state.logits.shape[0]
  tokens = jnp.full((num_rows, _BLOCK), NO_TOKEN, jnp.int32)

  def is_open(carry):
    state, _, drawn = carry
    return (drawn < limit) & ~jnp.all(state.is_done)

  def draw_and_run(carry):
    state, tokens, drawn = carry
    token = _draw(state.logits, jax.random.fold_in(key, state.step), sampling)
    shown = jnp.where(state.is_done, NO_TOKEN, token)
    tokens = jax.lax.dynamic_update_slice(tokens, shown[:, None], (0, drawn))
    logits, aux = model.apply(
      {"params": params}, token[:, None], cache=state.cache
    )
    is_stop = jnp.any(token[:, None] == stop_tokens, axis=1)
    state = DecodeState(
      logits[:, 0], aux.cache, state.is_done | is_stop, state.step + 1
    )
    return state, tokens, drawn + 1

  state, tokens, _ = jax.lax.while_loop(
    is_open, draw_and_run, (state, tokens, jnp.int32(0))
  )
  return state, tokens


def _draw(logits, key, sampling):
  if sampling is None:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = _keep_top_p(logits / sampling.temperature, sampling.top_p)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def _keep_top_p(logits, top_p):
  """-inf for tokens behind those that reach `top_p`; the first always stays."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  probs = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs
  # The likeliest first: its sum before it is 0, below any `top_p`.
  least = jnp.min(
    jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True
  )
  return jnp.where(logits >= least, logits, -jnp.inf)


def _check_rows(config, tokens, lengths, cache):
  held = np.asarray(cache.lengths)
  if not tokens.size or not lengths.shape == held.shape == tokens.shape[:1]:
    raise ValueError(
      "`tokens` must be one or more rows, with as many `lengths` and rows of"
      f" `cache`: got tokens.shape={tokens.shape}, lengths.shape="
      f"{lengths.shape} and a cache of {held.size} rows."
    )
  if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
    raise ValueError(
      f"`lengths` must be from 1 to the {tokens.shape[1]} tokens of a row: got"
      f" {lengths.tolist()}. Count the real tokens of each."
    )
  if np.max(held + lengths) > cache.capacity:
    raise ValueError(
      "`tokens` must fit in `cache` behind what it holds: got"
      f" {lengths.tolist()} tokens behind {held.tolist()} for a capacity of"
      f" {cache.capacity}. Make the cache larger with `init_cache`."
    )
  is_real = np.arange(tokens.shape[1]) < lengths[:, None]
  wrong = tokens[is_real & ((tokens < 0) | (tokens >= config.vocab_size))]
  if wrong.size:
    raise ValueError(
      "`tokens` must be ids from 0, below `vocab_size`: got"
      f" {wrong[:10].tolist()} for vocab_size={config.vocab_size}. Is this the"
      " model's tokenizer?"
    )


def _check_sampling(config, temperature, top_p, stop_tokens):
  if not temperature >= 0:  # True for NaN too.
    raise ValueError(
      "`temperature` must be 0 (likeliest token) or positive: got"
      f" {temperature}."
    )
  if not 0 < top_p <= 1:
    raise ValueError(f"`top_p` must be above 0 and at most 1: got {top_p}.")
  wrong = [token for token in stop_tokens if not 0 <= token < config.vocab_size]
  if wrong:
    raise ValueError(
      "`stop_tokens` must be token ids below `vocab_size`: got"
      f" {wrong} for vocab_size={config.vocab_size}."
    )


def _check_prompts(config, prompts, max_new_tokens):
  if not len(prompts) or not all(len(prompt) for prompt in prompts):
    raise ValueError(
      "`prompts` must be one or more sequences of at least one token: got"
      f" lengths {[len(prompt) for prompt in prompts]}."
    )
  if max_new_tokens < 1:
    raise ValueError(
      f"`max_new_tokens` must be at least 1: got {max_new_tokens}."
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
