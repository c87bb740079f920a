# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Caches of generation, which follow ownership.

Every layer owns its latents; only a full layer owns index keys, so a reuse
schedule removes the others' from memory.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from indexcache_jax import config as config_lib
from indexcache_jax import costs, types
from pallas_kernels import packing

PackedLatent = packing.PackedLatent


@flax.struct.dataclass
class Cache:
  """Rows of all past tokens, one array a layer so that updates are in place.

  Attributes:
    kv_latent: L arrays, a latent row a token; where a TPU's kernel reads them,
      packed as it does.
    index_keys: F arrays, those of the full layers in order.
    index_key_scales: F arrays, a factor a key, where the keys are 8-bit floats
      (`config.index_key_dtype`); else none.
    lengths: tokens already in each sequence.
  """

  kv_latent: tuple[Float[Array, "B S C"] | PackedLatent, ...]
  index_keys: tuple[Float[Array, "B S D"], ...]
  index_key_scales: tuple[Float32[Array, "B S"], ...]
  lengths: Int32[Array, " B"]

  @property
  def capacity(self) -> int:
    """S: tokens that fit."""
    latent = self.kv_latent[0]
    if isinstance(latent, PackedLatent):
      return latent.num_keys
    return latent.shape[1]

  @property
  def num_bytes(self) -> int:
    """Bytes of all rows."""
    arrays = (self.kv_latent, self.index_keys, self.index_key_scales)
    return sum(array.nbytes for array in jax.tree.leaves(arrays))


def init_cache(
  config: config_lib.SparseTransformerConfig, batch_size: int, capacity: int
) -> Cache:
  """Returns an empty cache for `capacity` tokens a sequence.

  Memory: `B S (L C + F D)` elements of `config.dtype`; with 8-bit index keys,
  `F (D + 4)` bytes a token for them instead; packed for a TPU, a latent takes
  whole rows of 512 bytes. On a GPU a capacity that is not a multiple of 8 costs
  a copy of a layer's index keys with each use.

  Raises:
    ValueError: no row or no token, or more bytes than the device has free.
  """
  if batch_size < 1 or capacity < 1:
    raise ValueError(
      "`batch_size` and `capacity` must be at least 1: got"
      f" batch_size={batch_size}, capacity={capacity}."
    )

  _check_memory(config, batch_size, capacity)

  def rows(width, dtype):
    return jnp.zeros((batch_size, capacity, width), dtype)

  def latents():
    if _is_packed(config):
      return packing.empty(
        batch_size, capacity, config.latent_dim, config.dtype
      )
    return rows(config.latent_dim, config.dtype)

  num_full = config.schedule.num_full
  key_dtype = config.index_key_dtype or config.dtype

  return Cache(
    kv_latent=tuple(latents() for _ in range(config.num_hidden_layers)),
    index_keys=tuple(
      rows(config.index_head_dim, key_dtype) for _ in range(num_full)
    ),
    index_key_scales=tuple(
      jnp.ones((batch_size, capacity), jnp.float32)
      for _ in range(num_full if config.quantizes_index_keys else 0)
    ),
    lengths=jnp.zeros((batch_size,), jnp.int32),
  )


def _is_packed(config):
  return packing.is_preferred(config.dtype, config.implementation)


def _check_memory(config, batch_size, capacity):
  """Refuses a cache for which the device has no room, with the sum."""
  # None on a CPU, whose memory is the host's.
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" not in stats:
    return
  free = stats["bytes_limit"] - stats["bytes_in_use"]
  token_bytes = costs.schedule_costs(config, context=capacity).cache_bytes
  if _is_packed(config):
    token_bytes += config.num_hidden_layers * packing.padding_bytes(
      config.latent_dim, config.dtype
    )
  needed = batch_size * capacity * token_bytes
  if needed > free:
    raise ValueError(
      "`batch_size` x `capacity` must fit in the device's memory: got"
      f" {batch_size} x {capacity} tokens x {token_bytes} bytes"
      f" ({config.num_hidden_layers} latents of {config.latent_dim} and"
      f" {config.schedule.num_full} index keys of {config.index_head_dim}) ="
      f" {needed / 2**30:.2f} GiB, where {free / 2**30:.2f} GiB are free. Take"
      " fewer or shorter sequences, or a schedule with fewer full layers."
    )


def write_rows(
  rows: Float[Array, "B S *E"],
  new: Float[Array, "B T *E"],
  positions: types.Positions,
) -> Float[Array, "B S *E"]:
  """Writes `new` at `positions`; a position beyond the capacity is dropped.

  A clamped write would overwrite the last token in silence.
  """
  write = jax.vmap(lambda r, n, p: r.at[p].set(n.astype(r.dtype), mode="drop"))
  return write(rows, new, positions)


def write_latents(
  latents: Float[Array, "B S C"] | PackedLatent,
  new: Float[Array, "B T C"],
  positions: types.Positions,
) -> Float[Array, "B S C"] | PackedLatent:
  """`write_rows` into latents of either form."""
  if isinstance(latents, PackedLatent):
    return packing.write(latents, new, positions)
  return write_rows(latents, new, positions)


def plain_latents(
  latents: Float[Array, "B S C"] | PackedLatent,
) -> Float[Array, "B S C"]:
  """Latents as rows: a copy of packed ones."""
  if isinstance(latents, PackedLatent):
    return packing.unpack(latents)
  return latents
