# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The schedule of most similarity: the paper's negative result.

IndexCache (arXiv 2603.12201), appendix C: choosing full layers by how similar
a layer's attention output is under another's indices does no better than the
uniform rule, though this optimum is exact.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from indexcache_jax import schedule as schedule_lib


def dp_schedule(
  similarity: Float[np.ndarray, "L L"],
  num_full: int,
  pinned: Sequence[int] = (0,),
) -> schedule_lib.ReuseSchedule:
  """Maximises `sum_l similarity[l, source(l)]` over schedules of `num_full`.

  Exact, in float64, by dynamic programming over the last full layer; O(L**3)
  time and O(L**2) memory. Of equally good schedules, the one whose last full
  layer is lowest, then the last but one, and so on.

  Args:
    similarity: row l, column j: how well layer l does with the indices of
      layer j. Read at j <= l only.
    num_full: full layers wanted.
    pinned: layers that must be full; layer 0 always is.

  Returns:
    The schedule.

  Raises:
    ValueError: if `num_full` cannot hold the pinned layers or exceeds L, or a
      similarity that is read is not finite.
  """
  num_layers = len(similarity)
  pinned = sorted({0, *pinned})
  check_num_full(num_layers, num_full, pinned)
  if not np.all(np.isfinite(np.tril(similarity))):
    raise ValueError(
      "`similarity` must be finite on and below the diagonal: got"
      f" {np.argwhere(~np.isfinite(np.tril(similarity))).tolist()} (layer,"
      " source) that are not."
    )
  gains = _group_gains(np.asarray(similarity, np.float64), pinned)
  # best[f]: of layers before f, where f is the next full layer.
  best = np.full(num_layers + 1, -np.inf)
  best[0] = 0.0
  choices = []
  for _ in range(num_full):
    totals = best[:num_layers, None] + gains
    choices.append(np.argmax(totals, axis=0))
    best = np.max(totals, axis=0)
  letters, stop = ["S"] * num_layers, num_layers
  for choice in reversed(choices):
    stop = int(choice[stop])
    letters[stop] = "F"
  return schedule_lib.ReuseSchedule("".join(letters))


def _group_gains(similarity, pinned):
  """[f, g]: gain of f serving f, ..., g - 1; -inf if that is not allowed."""
  num_layers = len(similarity)
  gains = np.full((num_layers, num_layers + 1), -np.inf)
  for full in range(num_layers):
    later = [layer for layer in pinned if layer > full]
    limit = min(later, default=num_layers)
    gains[full, full + 1 : limit + 1] = np.cumsum(similarity[full:limit, full])
  return gains


def check_num_full(
  num_layers: int, num_full: int, pinned: Sequence[int]
) -> None:
  """Raises ValueError unless `num_full` layers can hold the pinned ones."""
  outside = [layer for layer in pinned if not 0 <= layer < num_layers]
  if outside:
    raise ValueError(
      f"`pinned` must name layers from 0 to {num_layers - 1}: got {outside}"
      f" among {tuple(pinned)}."
    )
  if not len(pinned) <= num_full <= num_layers:
    raise ValueError(
      f"`num_full` must be from {len(pinned)}, the pinned layers"
      f" {tuple(pinned)}, to num_layers={num_layers}: got {num_full}."
    )
