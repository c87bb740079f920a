# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The latent cache as 32-bit words, so that a TPU can copy any one row.

A TPU stores a bfloat16 matrix in tiles of 8 rows, two rows to a 32-bit word,
and its DMA engine moves whole words of whole tiles: Mosaic rejects a copy of
one row of [S, C]. So a word holds two columns of one row, and a token is P
consecutive rows of 128 words: one contiguous copy, 1536 bytes for 576 columns.
The same draft of the kernel (8 queries, 64 heads, 2048 rows, v6e, static
cycles; the overlap of `mosaic_tpu_kernel` came later) with other forms:

  this, words [3 S, 128]     111 K
  words [S, 4, 128]          113 K, 2048 bytes a row
  bfloat16 [S, 8, 128]       115 K, 2048 bytes a row
  words [S, 1, 384]          171 K, three strided pieces in VMEM
  words [S, 384]             206 K, three strided pieces on both sides
  words [S, 3, 128], bfloat16 [S, 5, 128]: XLA copies the cache at each call

The scalar unit, which issues the copies, is the limit and not the memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt32

LANES = 128
_SUBLANES = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedLatent:
  """A latent cache that `mosaic_tpu` reads in place.

  Attributes:
    words: token s at rows `s * row_tiles(width, dtype)` and on; behind the
      last token zeros, which index -1 reads.
    num_keys: tokens there is room for.
    width: columns of a row.
    dtype: of the columns.
  """

  words: UInt32[Array, "B R 128"]
  num_keys: int = dataclasses.field(metadata={"static": True})
  width: int = dataclasses.field(metadata={"static": True})
  dtype: jnp.dtype = dataclasses.field(metadata={"static": True})


def row_tiles(width: int, dtype) -> int:
  """Rows of 128 words that one token takes."""
  return -(-width * jnp.dtype(dtype).itemsize // (4 * LANES))


def padding_bytes(width: int, dtype: DTypeLike) -> int:
  """Bytes by which a packed token is longer than its columns."""
  itemsize = jnp.dtype(dtype).itemsize
  return row_tiles(width, dtype) * LANES * 4 - width * itemsize


def num_rows(num_keys: int, width: int, dtype: DTypeLike) -> int:
  """Rows of 128 words that a cache for `num_keys` tokens takes."""
  # A token of zeros; whole tiles, so that the batch merges without a copy.
  rows = (num_keys + 1) * row_tiles(width, dtype)
  return rows + -rows % _SUBLANES


def pack(latent: Float[Array, "B S C"]) -> PackedLatent:
  """Packs a cache: one copy of it."""
  num_keys, width = latent.shape[1:]
  words = pack_rows(latent)
  extra = num_rows(num_keys, width, latent.dtype) - words.shape[1]
  return PackedLatent(
    words=jnp.pad(words, ((0, 0), (0, extra), (0, 0))),
    num_keys=num_keys,
    width=width,
    dtype=latent.dtype,
  )


def empty(
  batch: int, num_keys: int, width: int, dtype: DTypeLike
) -> PackedLatent:
  """A packed cache of zeros, for tokens to be written into."""
  rows = num_rows(num_keys, width, dtype)
  return PackedLatent(
    words=jnp.zeros((batch, rows, LANES), jnp.uint32),
    num_keys=num_keys,
    width=width,
    dtype=jnp.dtype(dtype),
  )


def write(
  packed: PackedLatent,
  latent: Float[Array, "B T C"],
  positions: Int32[Array, "B T"],
) -> PackedLatent:
  """Writes tokens at `positions`; one beyond the last place is dropped."""
  tiles = row_tiles(packed.width, packed.dtype)
  # Out of the array, where behind the last token the zeros stand.
  beyond = packed.words.shape[1]
  first = jnp.where(positions < packed.num_keys, positions * tiles, beyond)
  rows = first[..., None] + jnp.arange(tiles)
  write_rows = jax.vmap(
    lambda words, new, at: words.at[at].set(new, mode="drop")
  )
  new = pack_rows(latent.astype(packed.dtype))
  words = write_rows(packed.words, new, rows.reshape(rows.shape[0], -1))
  return dataclasses.replace(packed, words=words)


def pack_rows(latent: Float[Array, "B T C"]) -> UInt32[Array, "B TP 128"]:
  """Packs tokens to be written into `PackedLatent.words`.

  With P = `row_tiles`, word (p, lane) of a bfloat16 row holds column
  `128 p + lane` in its low half and column `128 (P + p) + lane` in its high
  half: the kernel takes both halves apart without a move across lanes.
  """
  batch, tokens, width = latent.shape
  tiles = row_tiles(width, latent.dtype)
  columns = tiles * LANES * 4 // latent.dtype.itemsize
  padded = jnp.pad(latent, ((0, 0), (0, 0), (0, columns - width)))
  if latent.dtype == jnp.float32:
    words = jax.lax.bitcast_convert_type(padded, jnp.uint32)
  elif latent.dtype == jnp.bfloat16:
    bits = jax.lax.bitcast_convert_type(padded, jnp.uint16).astype(jnp.uint32)
    low, high = jnp.split(bits, 2, axis=-1)
    words = low | (high << 16)
  else:
    raise NotImplementedError(
      f"packs bfloat16 and float32 latents: got {latent.dtype}"
    )
  return words.reshape(batch, tokens * tiles, LANES)


def unpack(packed: PackedLatent) -> Float[Array, "B S C"]:
  """The inverse of `pack`."""
  batch = packed.words.shape[0]
  tiles = row_tiles(packed.width, packed.dtype)
  words = packed.words[:, : packed.num_keys * tiles]
  words = words.reshape(batch, packed.num_keys, tiles * LANES)
  if packed.dtype == jnp.float32:
    columns = jax.lax.bitcast_convert_type(words, jnp.float32)
  else:
    bits = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)
    columns = jax.lax.bitcast_convert_type(
      bits.astype(jnp.uint16), packed.dtype
    )
  return columns[..., : packed.width]
