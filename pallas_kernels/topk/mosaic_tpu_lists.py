# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The eight largest keys of each of many groups, in one read of a row.

A search over 128K keys reads them again for every bound that it tries. Where
about k groups share the keys, a group seldom holds more than eight of the k
largest, so the lists of its eight largest hold them all, in an eighth of the
memory or less. They are a guess all the same: what they lack is found by a
count of all keys.

A group is the keys of one lane in every so-many-th block: neighbouring keys,
which score alike, fall into different groups. Values are float32, for a TPU
has a minimum and a maximum of those in one instruction each; of integers a
comparison and a selection each.
"""

import jax
import jax.numpy as jnp

DEPTH = 8
# Groups that one chunk of 32 blocks fills: four, of eight keys each.
_GROUPS_A_CHUNK = 4
MAX_GROUPS = 16

# Comparators, by steps, that sort eight (19; fewer do not).
_SORT = (
  ((0, 2), (1, 3), (4, 6), (5, 7)),
  ((0, 4), (1, 5), (2, 6), (3, 7)),
  ((0, 1), (2, 3), (4, 5), (6, 7)),
  ((2, 4), (3, 5)),
  ((1, 4), (3, 6)),
  ((1, 2), (3, 4), (5, 6)),
)
# And eight that first rise, then fall, or the reverse.
_SORT_BITONIC = (
  ((0, 4), (1, 5), (2, 6), (3, 7)),
  ((0, 2), (1, 3), (4, 6), (5, 7)),
  ((0, 1), (2, 3), (4, 5), (6, 7)),
)


def clear(lists_ref):
  """Empties the lists: nothing is above -inf."""
  nothing = jnp.full(lists_ref.shape[1:], -jnp.inf, jnp.float32)
  bits = jax.lax.bitcast_convert_type(nothing, jnp.int32)

  def store(n, carry):
    lists_ref[n] = bits
    return carry

  jax.lax.fori_loop(0, lists_ref.shape[0], store, 0, unroll=DEPTH)


def insert(lists_ref, chunk, rows, scores):
  """Merges a chunk's scores into the lists of its groups.

  Args:
    lists_ref: `[8 * G, R, 128]` the bits of float32, G a power of two: the
      largest of all groups, then the second largest, and so on.
    chunk: its number chooses the groups.
    rows: eight of R.
    scores: 32 of float32 `[8, 128]`, no NaN.
  """
  num_groups = lists_ref.shape[0] // DEPTH
  share = min(num_groups, _GROUPS_A_CHUNK)
  # One number that varies, so that the compiler knows the groups apart.
  first = chunk * share % num_groups
  for n in range(share):
    places = [first + (depth * num_groups + n) for depth in range(DEPTH)]
    largest = [
      jax.lax.bitcast_convert_type(lists_ref[place, rows], jnp.float32)
      for place in places
    ]
    members = scores[n::share]
    for begin in range(0, len(members), DEPTH):
      others = _sort(members[begin : begin + DEPTH], _SORT)
      # The larger of each pair, one list from its other end, are the eight
      # largest of both.
      largest = [
        jnp.maximum(x, y) for x, y in zip(largest, others[::-1], strict=True)
      ]
      largest = _sort(largest, _SORT_BITONIC)
    for place, x in zip(places, largest, strict=True):
      lists_ref[place, rows] = jax.lax.bitcast_convert_type(x, jnp.int32)


def _sort(values, network):
  """Puts the largest first."""
  values = list(values)
  for i, j in (pair for step in network for pair in step):
    values[i], values[j] = (
      jnp.maximum(values[i], values[j]),
      jnp.minimum(values[i], values[j]),
    )
  return values
