# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`hopper.row_sums` in plain XLA, for machines without a Hopper GPU."""

import jax.numpy as jnp

from pallas_kernels.hopper import chip

CHIP = chip.Chip("NVIDIA H200", 4)


def chunk_items(sizes, bounds):
  """Number of each item of a chunk, and whether there is one."""
  items = bounds[0] + jnp.arange(sizes.max_items)
  return items, items < bounds[1]


def record(sizes, indices, exists, bits):
  """Places of the rows `indices` [items, rows]; sets `bits`, a reference."""
  item = jnp.arange(sizes.max_items)[:, None]
  wanted = jnp.where((indices >= 0) & exists[:, None], indices, sizes.num_keys)
  # What no item has, nobody reads.
  places = jnp.full((sizes.max_items, sizes.num_keys), -(1 << 30), jnp.int32)
  places = places.at[item, wanted].set(
    jnp.arange(sizes.rows_an_item)[None], mode="drop"
  )
  bit = jnp.broadcast_to(1 << (item % 32), wanted.shape)
  bits[...] = bits[...].at[item // 32, wanted].add(bit, mode="drop")
  return places


def add_chunk(sizes, bounds, bits, addends, places, total):
  """As `row_sums.add_chunk`, an item at a time."""
  rows = jnp.arange(sizes.num_keys)
  sums = jnp.zeros((sizes.num_keys, sizes.width), jnp.float32)
  for item in range(sizes.max_items):
    has_row = bits[item // 32] >> (item % 32) & 1
    source = jnp.where(has_row, item * sizes.rows_an_item + places[item], 0)
    sums += jnp.where(has_row[:, None], addends[source], 0).astype(jnp.float32)
  total[...] = total[...].at[bounds[2] + rows].add(sums)
