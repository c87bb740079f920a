# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a greedy search was asked for and has learnt: enough to resume it."""

import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from indexcache_jax import schedule as schedule_lib

_SETTINGS = ("num_layers", "num_shared", "pinned", "blocks", "lazy")


@dataclasses.dataclass(frozen=True)
class SearchState:
  """The settings of a search and every loss known so far.

  A search is a function of these alone: on resuming, known losses stand in
  for calls of `loss_fn`, so the result is that of an uninterrupted search to
  the last bit, its count of evaluations included. Whoever saves it sees to it
  that the model and the calibration batches are the same on resuming.

  Attributes:
    num_layers: L.
    num_shared: layers to flip.
    pinned: layers that never flip, ascending; layer 0 and the first layer of
      each block are added.
    blocks: first layer of each pipeline block; given as a number of blocks,
      they are split evenly, the first ones one layer longer; None: one block.
    lazy: whether stale costs spare evaluations, see `greedy_search`.
    losses: loss of each evaluated pattern, in order of evaluation.
  """

  num_layers: int
  num_shared: int
  pinned: Sequence[int] = (0,)
  blocks: int | Sequence[int] | None = None
  lazy: bool = False
  losses: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.num_layers < 1:
      raise ValueError(
        f"`num_layers` must be at least 1: got {self.num_layers}."
      )
    blocks = _block_starts(self.num_layers, self.blocks)
    pinned = tuple(sorted({0, *map(int, self.pinned), *blocks}))
    object.__setattr__(self, "blocks", blocks)
    object.__setattr__(self, "pinned", pinned)
    _check_flips(self)

  @property
  def evaluations(self) -> int:
    """Losses known."""
    return len(self.losses)

  @property
  def evaluations_bound(self) -> int:
    """Evaluations of the whole search; of a lazy one, the most there can be.

    A lazy search's bound falls with each flip that needed fewer.
    """
    known = collections.Counter(
      pattern.count("S") for pattern in self.losses if "S" in pattern
    )
    flip = max(known, default=1)  # The one now sought, counted from 1.
    sizes = [size for _, size in self.rounds()]
    past = sum(known[number] for number in range(1, flip))
    baseline = int(self.lazy and self.num_shared > 0)
    return baseline + past + sum(sizes[flip - 1 :])

  def rounds(self) -> Iterator[tuple[range, int]]:
    """For each flip, the block that it is sought in and its candidates.

    Blocks take turns (the paper's pipeline variant); one whose layers are all
    shared or pinned is passed over.
    """
    return itertools.islice(self._turns(), self.num_shared)

  def _turns(self):
    stops = (*self.blocks[1:], self.num_layers)
    blocks = [range(*bounds) for bounds in zip(self.blocks, stops, strict=True)]
    free = [len(set(block) - set(self.pinned)) for block in blocks]
    while any(free):
      for number, block in enumerate(blocks):
        if free[number]:
          yield block, free[number]
          free[number] -= 1

  def check_resumes(self, settings: "SearchState") -> None:
    """Raises ValueError unless a search with `settings` may go on from here.

    `num_shared` may differ: schedules are nested, so a search can be extended.
    """
    for name in ("num_layers", "pinned", "blocks", "lazy"):
      kept, asked = getattr(self, name), getattr(settings, name)
      if kept != asked:
        raise ValueError(
          f"`state` must come from a search with the same {name}: got"
          f" {kept!r} in the state, {asked!r} asked for. Resume with the"
          " state's settings, or start afresh without a state."
        )

  def to_json(self) -> str:
    """Returns the state as JSON; floats keep every bit."""
    fields = {name: getattr(self, name) for name in _SETTINGS}
    return json.dumps({**fields, "losses": dict(self.losses)})

  @classmethod
  def from_json(cls, text: str) -> "SearchState":
    """Reads what `to_json` wrote.

    Raises:
      ValueError: if it is not such a text, or holds impossible settings.
    """
    try:
      fields = json.loads(text)
    except json.JSONDecodeError as error:
      raise ValueError(
        f"`text` must be JSON of `SearchState.to_json`: {error}. The file may"
        " have been cut off while being written; start afresh without it."
      ) from error
    _check_fields(fields)
    state = cls(**fields)
    _check_losses(state)
    return state


def _block_starts(
  num_layers: int, blocks: int | Sequence[int] | None
) -> tuple[int, ...]:
  if blocks is None:
    return (0,)
  if isinstance(blocks, int):
    if not 1 <= blocks <= num_layers:
      raise ValueError(
        "`blocks` must be from 1 to num_layers, or the blocks' first layers:"
        f" got {blocks} for num_layers={num_layers}."
      )
    short, longer = divmod(num_layers, blocks)
    return tuple(n * short + min(n, longer) for n in range(blocks))
  starts = tuple(map(int, blocks))
  if (
    not starts
    or starts[0] != 0
    or starts[-1] >= num_layers
    or any(a >= b for a, b in itertools.pairwise(starts))
  ):
    raise ValueError(
      "`blocks` must name the blocks' first layers, ascending from 0 and below"
      f" num_layers: got {starts} for num_layers={num_layers}. For equal blocks"
      " give their number."
    )
  return starts


def _check_flips(state):
  outside = [n for n in state.pinned if not 0 <= n < state.num_layers]
  if outside:
    raise ValueError(
      f"`pinned` must name layers from 0 to {state.num_layers - 1}: got"
      f" {outside} among {state.pinned} for num_layers={state.num_layers}."
    )
  free = state.num_layers - len(state.pinned)
  if not 0 <= state.num_shared <= free:
    raise ValueError(
      f"`num_shared` must be from 0 to {free}, the layers that are not pinned:"
      f" got {state.num_shared} for num_layers={state.num_layers},"
      f" pinned={state.pinned} (with layer 0 and the blocks' first layers)."
      " Share fewer layers or pin fewer."
    )


def _check_losses(state):
  for pattern, loss in state.losses.items():
    schedule_lib.ReuseSchedule.from_pattern(pattern, state.num_layers)
    if not math.isfinite(loss):
      raise ValueError(
        f"`losses` must be finite: got {loss!r} for {pattern!r}."
      )


def _check_fields(fields: Any):
  kinds = {
    "num_layers": int,
    "num_shared": int,
    "pinned": list,
    "blocks": list,
    "lazy": bool,
    "losses": dict,
  }
  if not isinstance(fields, dict) or fields.keys() != kinds.keys():
    found = sorted(fields) if isinstance(fields, dict) else type(fields)
    raise ValueError(
      f"`text` must be an object with the keys {sorted(kinds)}: got {found}."
    )
  numbers = {"pinned": int, "blocks": int, "losses": (int, float)}
  for name, kind in kinds.items():
    value = fields[name]
    is_right = type(value) is kind
    if is_right and name in numbers:
      members = value.values() if kind is dict else value
      is_right = all(
        isinstance(member, numbers[name]) and not isinstance(member, bool)
        for member in members
      )
    if not is_right:
      raise ValueError(
        f"`{name}` in a search state must be of {kind.__name__} and hold"
        f" numbers where it holds several: got {value!r}."
      )
