# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Caches of generation, which follow ownership.

Every layer owns its latents; only a full layer owns index keys, so a reuse
schedule removes the others' from memory.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from indexcache_jax import config as config_lib
from indexcache_jax import types


@flax.struct.dataclass
class Cache:
  """Rows of all past tokens, one array a layer so that updates are in place.

  Attributes:
    kv_latent: L arrays, a latent row a token.
    index_keys: F arrays, those of the full layers in order.
    lengths: tokens already in each sequence.
  """

  kv_latent: tuple[Float[Array, "B S C"], ...]
  index_keys: tuple[Float[Array, "B S D"], ...]
  lengths: Int32[Array, " B"]

  @property
  def capacity(self) -> int:
    """S: tokens that fit."""
    return self.kv_latent[0].shape[1]

  @property
  def num_bytes(self) -> int:
    """Bytes of all rows."""
    return sum(rows.nbytes for rows in (*self.kv_latent, *self.index_keys))


def init_cache(
  config: config_lib.SparseTransformerConfig, batch_size: int, capacity: int
) -> Cache:
  """Returns an empty cache for `capacity` tokens a sequence.

  Memory: `B S (L C + F D)` elements of `config.dtype`.

  Raises:
    ValueError: no row or no token, or more bytes than the device has free.
  """
  if batch_size < 1 or capacity < 1:
    raise ValueError(
      "`batch_size` and `capacity` must be at least 1: got"
      f" batch_size={batch_size}, capacity={capacity}."
    )

  _check_memory(config, batch_size, capacity)

  def rows(width):
    return jnp.zeros((batch_size, capacity, width), config.dtype)

  return Cache(
    kv_latent=tuple(
      rows(config.latent_dim) for _ in range(config.num_hidden_layers)
    ),
    index_keys=tuple(
      rows(config.index_head_dim) for _ in range(config.schedule.num_full)
    ),
    lengths=jnp.zeros((batch_size,), jnp.int32),
  )


def _check_memory(config, batch_size, capacity):
  """Refuses a cache for which the device has no room, with the sum."""
  # None on a CPU, whose memory is the host's.
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" not in stats:
    return
  free = stats["bytes_limit"] - stats["bytes_in_use"]
  latents = config.num_hidden_layers * config.latent_dim
  keys = config.schedule.num_full * config.index_head_dim
  itemsize = jnp.dtype(config.dtype).itemsize
  needed = batch_size * capacity * (latents + keys) * itemsize
  if needed > free:
    raise ValueError(
      "`batch_size` x `capacity` must fit in the device's memory: got"
      f" {batch_size} x {capacity} tokens x {(latents + keys) * itemsize} bytes"
      f" ({config.num_hidden_layers} latents of {config.latent_dim} and"
      f" {config.schedule.num_full} index keys of {config.index_head_dim}) ="
      f" {needed / 2**30:.2f} GiB, where {free / 2**30:.2f} GiB are free. Take"
      " fewer or shorter sequences, or a schedule with fewer full layers."
    )


def write_rows(
  rows: Float[Array, "B S E"],
  new: Float[Array, "B T E"],
  positions: types.Positions,
) -> Float[Array, "B S E"]:
  """Writes `new` at `positions`; a position beyond the capacity is dropped.

  A clamped write would overwrite the last token in silence.
  """
  write = jax.vmap(lambda r, n, p: r.at[p].set(n.astype(r.dtype), mode="drop"))
  return write(rows, new, positions)
