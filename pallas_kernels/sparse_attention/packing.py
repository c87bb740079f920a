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

A server keeps its cache packed: `empty`, then `write` as tokens come, and
`sparse_mla_packed` reads it in place. Any device packs and unpacks; only a
TPU's kernel gains by it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels import tpu

LANES = 128
_SUBLANES = 8
_DTYPES = (jnp.bfloat16, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedLatent:
  """Latent rows in words, made by `pack` or `empty`.

  Attributes:
    words: token s at rows `s * row_tiles(width, dtype)` and on; behind the
      last token zeros, which index -1 reads.
    num_keys: S, tokens there is room for.
    width: C, columns of a row.
    dtype: of the columns, bfloat16 or float32.
  """

  words: UInt32[Array, "B R 128"]
  num_keys: int = dataclasses.field(metadata={"static": True})
  width: int = dataclasses.field(metadata={"static": True})
  dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, int, int]:
    """Of the rows that these stand for: `[B, S, C]`."""
    return (self.words.shape[0], self.num_keys, self.width)


def row_tiles(width: int, dtype: DTypeLike) -> int:
  """P: rows of 128 words that one token takes."""
  return -(-width * jnp.dtype(dtype).itemsize // (4 * LANES))


def padding_bytes(width: int, dtype: DTypeLike) -> int:
  """Bytes by which a packed token is longer than its columns."""
  itemsize = jnp.dtype(dtype).itemsize
  return row_tiles(width, dtype) * LANES * 4 - width * itemsize


def num_rows(num_keys: int, width: int, dtype: DTypeLike) -> int:
  """R: rows of 128 words that a cache for `num_keys` tokens takes."""
  # A token of zeros; whole tiles, so that the batch merges without a copy.
  rows = (num_keys + 1) * row_tiles(width, dtype)
  return rows + -rows % _SUBLANES


def is_preferred(dtype: DTypeLike, implementation: str | None) -> bool:
  """Whether a cache of `dtype` should be kept packed.

  Args:
    dtype: of the latents.
    implementation: that `sparse_mla` will be called with.
  """
  if implementation is None and jax.default_backend() != "tpu":
    return False
  if implementation not in (None, "mosaic_tpu"):
    return False
  try:
    tpu.chip()
  except NotImplementedError:
    return False
  return jnp.dtype(dtype) in _DTYPES


def pack(kv_latent: Float[Array, "B S C"]) -> PackedLatent:
  """Packs latent rows, bit for bit.

  Memory: a second copy of them, `512 * row_tiles(C, dtype)` bytes a token: 1536
  for 576 columns of bfloat16, which are 1152.

  Raises:
    NotImplementedError: another dtype than bfloat16 and float32.
  """
  num_keys, width = kv_latent.shape[1:]
  words = pack_rows(kv_latent)
  extra = num_rows(num_keys, width, kv_latent.dtype) - words.shape[1]
  return PackedLatent(
    words=jnp.pad(words, ((0, 0), (0, extra), (0, 0))),
    num_keys=num_keys,
    width=width,
    dtype=kv_latent.dtype,
  )


def unpack(packed: PackedLatent) -> Float[Array, "B S C"]:
  """The rows, bit for bit, in `packed.dtype`: a copy of them.

  Raises:
    ValueError: words of another shape than `packed` says.
  """
  check(packed)
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


def empty(
  batch: int, num_keys: int, width: int, dtype: DTypeLike
) -> PackedLatent:
  """Zeros, for `num_keys` tokens of each sequence to be written into.

  Memory: `512 * batch * num_rows(num_keys, width, dtype)` bytes.

  Raises:
    NotImplementedError: another dtype than bfloat16 and float32.
    ValueError: a size below 1.
  """
  _check_dtype("dtype", jnp.dtype(dtype))
  if min(batch, num_keys, width) < 1:
    raise ValueError(
      "`batch`, `num_keys` and `width` must be at least 1: got"
      f" batch={batch}, num_keys={num_keys}, width={width}. Give room"
      " for a token or more."
    )
  rows = num_rows(num_keys, width, dtype)
  return PackedLatent(
    words=jnp.zeros((batch, rows, LANES), jnp.uint32),
    num_keys=num_keys,
    width=width,
    dtype=jnp.dtype(dtype),
  )


def write(
  packed: PackedLatent,
  kv_latent: Float[Array, "B T C"],
  positions: Int32[Array, "B T"],
) -> PackedLatent:
  """Writes tokens' rows, rounded to `packed.dtype`, at `positions`.

  In place where `packed` is donated. A token beyond the last place is dropped.

  Raises:
    ValueError: rows of another batch or width, or not one position a row.
  """
  check(packed)
  batch, _, width = packed.shape
  if (kv_latent.shape[0], kv_latent.shape[-1]) != (batch, width):
    raise ValueError(
      "`kv_latent` must have the batch and width of `packed`: got"
      f" kv_latent.shape={kv_latent.shape} for packed.shape={packed.shape}."
      " Make the cache with `packing.empty(batch, num_keys, width, dtype)` of"
      " these rows."
    )
  if positions.shape != kv_latent.shape[:2]:
    raise ValueError(
      "`positions` must have one entry a row of `kv_latent`: got"
      f" positions.shape={positions.shape}, kv_latent.shape={kv_latent.shape}."
      " Give the cache's place of each new row, [B, T]."
    )
  tiles = row_tiles(packed.width, packed.dtype)
  # Out of the array, where behind the last token the zeros stand.
  beyond = packed.words.shape[1]
  first = jnp.where(positions < packed.num_keys, positions * tiles, beyond)
  rows = first[..., None] + jnp.arange(tiles)
  write_rows = jax.vmap(
    lambda words, new, at: words.at[at].set(new, mode="drop")
  )
  new = pack_rows(kv_latent.astype(packed.dtype))
  words = write_rows(packed.words, new, rows.reshape(rows.shape[0], -1))
  return dataclasses.replace(packed, words=words)


def pack_rows(kv_latent: Float[Array, "B T C"]) -> UInt32[Array, "B TP 128"]:
  """Packs tokens to be written into `PackedLatent.words`.

  With P = `row_tiles`, word (p, lane) of a bfloat16 row holds column
  `128 p + lane` in its low half and column `128 (P + p) + lane` in its high
  half: the kernel takes both halves apart without a move across lanes.
  """
  _check_dtype("kv_latent.dtype", kv_latent.dtype)
  batch, tokens, width = kv_latent.shape
  tiles = row_tiles(width, kv_latent.dtype)
  columns = tiles * LANES * 4 // kv_latent.dtype.itemsize
  padded = jnp.pad(kv_latent, ((0, 0), (0, 0), (0, columns - width)))
  if kv_latent.dtype == jnp.float32:
    words = jax.lax.bitcast_convert_type(padded, jnp.uint32)
  else:
    bits = jax.lax.bitcast_convert_type(padded, jnp.uint16).astype(jnp.uint32)
    low, high = jnp.split(bits, 2, axis=-1)
    words = low | (high << 16)
  return words.reshape(batch, tokens * tiles, LANES)


def check(packed: PackedLatent) -> None:
  """Raises ValueError where the words are not those of the other fields.

  The kernel reads them without bounds checks.
  """
  expected = num_rows(packed.num_keys, packed.width, packed.dtype), LANES
  if packed.words.shape[1:] != expected:
    raise ValueError(
      f"`words` of {packed.num_keys} tokens of {packed.width} columns of"
      f" {packed.dtype} must be [B, {expected[0]}, {LANES}]: got"
      f" words.shape={packed.words.shape}. Make them with `packing.pack` or"
      " `packing.empty`."
    )


def _check_dtype(name, dtype):
  if dtype not in _DTYPES:
    raise NotImplementedError(
      f"`{name}` of a packed latent must be bfloat16 or float32: got {dtype}."
      " Cast the rows, or give them to `sparse_mla` as they are."
    )
