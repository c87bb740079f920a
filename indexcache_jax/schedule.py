# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Reuse schedules: which layers run their indexer, in every notation."""

import dataclasses
import functools
import json
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

_LETTERS = {"F": "full", "S": "shared"}
_TYPES = {name: letter for letter, name in _LETTERS.items()}


@dataclasses.dataclass(frozen=True)
class ReuseSchedule:
  """A value: one letter a layer, "F" for full and "S" for shared.

  A full layer runs its indexer; a shared layer takes `topk_indices` of its
  source layer, the nearest full layer before it (IndexCache, arXiv 2603.12201,
  section 3.1). Two schedules are equal if their patterns are.

  Attributes:
    pattern: letters "F" and "S", the first being "F".
  """

  pattern: str

  def __post_init__(self):
    if not isinstance(self.pattern, str):
      raise ValueError(
        "`pattern` must be a string of F and S: got"
        f" {self.pattern!r}. For a list use `ReuseSchedule.from_indexer_types`."
      )
    if not self.pattern:
      raise ValueError(
        "`pattern` must have one letter a layer: got an empty one. The smallest"
        " schedule is 'F'."
      )
    for place, letter in enumerate(self.pattern):
      if letter not in _LETTERS:
        raise ValueError(
          "`pattern` must consist of F (full) and S (shared): got"
          f" {letter!r} at layer {place} of {self.pattern!r}."
        )
    if self.pattern[0] != "F":
      raise ValueError(
        "`pattern` must begin with F, since the first layer has no earlier"
        f" selection to share: got {self.pattern!r}."
      )

  @classmethod
  def all_full(cls, num_layers: int) -> "ReuseSchedule":
    """Every layer runs its indexer: DSA without reuse."""
    _check_count("num_layers", num_layers)
    return cls("F" * num_layers)

  @classmethod
  def from_pattern(
    cls, pattern: str, num_layers: int | None = None
  ) -> "ReuseSchedule":
    """Reads "FSSF".

    Args:
      pattern: one letter a layer.
      num_layers: if given, the length that it must have.
    """
    schedule = cls(pattern)
    if num_layers is None:
      return schedule
    _check_count("num_layers", num_layers)
    if len(pattern) != num_layers:
      raise ValueError(
        "`pattern` must have one letter a layer: got"
        f" {len(pattern)} letters ({pattern!r}) for num_layers={num_layers}."
      )
    return schedule

  @classmethod
  def from_indexer_types(
    cls, indexer_types: Sequence[str], num_layers: int | None = None
  ) -> "ReuseSchedule":
    """Reads transformers' list of "full" and "shared"."""
    is_list = isinstance(indexer_types, Sequence) and not isinstance(
      indexer_types, str
    )
    if not is_list or not indexer_types:
      raise ValueError(
        "`indexer_types` must be a list of 'full' or 'shared', one a layer: got"
        f" {indexer_types!r}. For a string use `ReuseSchedule.from_pattern`."
      )
    letters = []
    for place, name in enumerate(indexer_types):
      if not isinstance(name, str) or name not in _TYPES:
        raise ValueError(
          "`indexer_types` must consist of 'full' and 'shared': got"
          f" {name!r} at layer {place}."
        )
      letters.append(_TYPES[name])
    return cls.from_pattern("".join(letters), num_layers)

  @classmethod
  def uniform(cls, num_layers: int, every: int = 4) -> "ReuseSchedule":
    """The paper's uniform rule: full at 0, every, 2 every, ...

    It is not what an engine does with `index_topk_freq`; see `from_freq`.
    """
    _check_count("num_layers", num_layers)
    _check_count("every", every)
    return cls(
      "".join("S" if layer % every else "F" for layer in range(num_layers))
    )

  @classmethod
  def from_freq(
    cls, num_layers: int, freq: int | None, offset: int | None = 2
  ) -> "ReuseSchedule":
    """The engines' rule: shared iff `max(l - offset + 1, 0) % freq != 0`.

    With freq 4 and offset 2 the full layers are 0, 1, 5, 9, ...; GLM-5.2 has
    freq 4 and offset 3.

    Args:
      num_layers: of the model.
      freq: `index_topk_freq`; None, as GLM-5.1's config has it, means 1.
      offset: `index_skip_topk_offset`; None means 2.
    """
    _check_count("num_layers", num_layers)
    freq = 1 if freq is None else freq
    offset = 2 if offset is None else offset
    if not _is_int(freq) or freq < 1:
      raise ValueError(
        f"`freq` (index_topk_freq) must be at least 1: got {freq!r}. 1 means"
        " that no layer is shared."
      )
    if not _is_int(offset) or offset < 1:
      raise ValueError(
        "`offset` (index_skip_topk_offset) must be at least 1, or layer 0 would"
        f" be shared: got {offset!r}. Engines default to 2."
      )
    return cls(
      "".join(
        "S" if max(layer - offset + 1, 0) % freq else "F"
        for layer in range(num_layers)
      )
    )

  @classmethod
  def parse(cls, text: str, num_layers: int) -> "ReuseSchedule":
    """Reads what one types for a model of `num_layers` layers.

    A pattern such as "FSSF"; "full"; "uniform:EVERY", see `uniform`; or
    "freq:FREQ" and "freq:FREQ:OFFSET", see `from_freq`.
    """
    if text == "full":
      return cls.all_full(num_layers)
    if match := re.fullmatch(r"uniform:(\d+)", text):
      return cls.uniform(num_layers, int(match[1]))
    if match := re.fullmatch(r"freq:(\d+)(?::(\d+))?", text):
      return cls.from_freq(num_layers, *(int(n) for n in match.groups() if n))
    if ":" in text or not set(text) & set(_LETTERS):
      raise ValueError(
        "`schedule` must be a pattern such as 'FSSF', 'full', 'uniform:4',"
        f" 'freq:4', or 'freq:4:3' with the offset: got {text!r}."
      )
    return cls.from_pattern(text, num_layers)

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "ReuseSchedule":
    """Reads a config.json, in the precedence of the engines.

    `indexer_types` before `index_topk_pattern` (a string or a list) before
    `index_topk_freq` with `index_skip_topk_offset`; null counts as absent.

    Args:
      config: with `num_hidden_layers` and any of the keys above.
    """
    num_layers = config.get("num_hidden_layers")
    _check_count("num_hidden_layers", num_layers)
    types = config.get("indexer_types")
    if types is not None and not isinstance(types, str):
      return cls.from_indexer_types(types, num_layers)
    pattern = types if types is not None else config.get("index_topk_pattern")
    if pattern is not None:
      if isinstance(pattern, str):
        return cls.from_pattern(pattern, num_layers)
      return cls.from_indexer_types(pattern, num_layers)
    return cls.from_freq(
      num_layers,
      config.get("index_topk_freq"),
      config.get("index_skip_topk_offset"),
    )

  def __str__(self) -> str:
    return self.pattern

  @property
  def num_layers(self) -> int:
    """L."""
    return len(self.pattern)

  @property
  def num_full(self) -> int:
    """Layers that run their indexer."""
    return self.pattern.count("F")

  @property
  def num_shared(self) -> int:
    """Layers that reuse a selection."""
    return self.pattern.count("S")

  @property
  def retention(self) -> float:
    """Share of the indexers that still run."""
    return self.num_full / self.num_layers

  @functools.cached_property
  def full_layers(self) -> tuple[int, ...]:
    """Numbers of the full layers, ascending."""
    return tuple(
      layer for layer, letter in enumerate(self.pattern) if letter == "F"
    )

  @functools.cached_property
  def source_layers(self) -> tuple[int, ...]:
    """For each layer the full layer whose selection it attends to."""
    return tuple(
      self.pattern.rindex("F", 0, layer + 1) for layer in range(self.num_layers)
    )

  @property
  def indexer_types(self) -> list[str]:
    """transformers' notation."""
    return [_LETTERS[letter] for letter in self.pattern]

  def is_full(self, layer: int) -> bool:
    """Whether the layer runs its indexer."""
    if not _is_int(layer) or not 0 <= layer < self.num_layers:
      raise ValueError(
        f"`layer` must be one of the {self.num_layers} layers, 0 to"
        f" {self.num_layers - 1}: got {layer!r}."
      )
    return self.pattern[layer] == "F"

  def served_layers(self, layer: int) -> tuple[int, ...]:
    """Layers that attend to a full layer's selection, itself included."""
    if not self.is_full(layer):
      raise ValueError(
        "`layer` must be full to serve others: got layer"
        f" {layer}, shared in {self.pattern!r}; its source is layer"
        f" {self.source_layers[layer]}."
      )
    return tuple(
      other
      for other, source in enumerate(self.source_layers)
      if source == layer
    )

  def flip(self, layer: int) -> "ReuseSchedule":
    """Returns the schedule with one layer turned from full to shared or back.

    Raises:
      ValueError: for layer 0, which must stay full.
    """
    letter = "S" if self.is_full(layer) else "F"
    return type(self)(self.pattern[:layer] + letter + self.pattern[layer + 1 :])

  def to_hf(self) -> dict[str, Any]:
    """Override for transformers: `GlmMoeDsaConfig(**override)`."""
    return {"indexer_types": self.indexer_types}

  def to_sglang(self) -> dict[str, Any]:
    """Override for SGLang's `--json-model-override-args`."""
    return {"index_topk_pattern": self.pattern}

  def to_vllm(self) -> dict[str, Any]:
    """Override for vLLM's `--hf-overrides`."""
    return {"use_index_cache": True, "index_topk_pattern": self.pattern}

  def engine_lines(self) -> dict[str, str]:
    """What to type for each engine, ready to paste."""
    return {
      "SGLang": f"--json-model-override-args '{json.dumps(self.to_sglang())}'",
      "vLLM": f"--hf-overrides '{json.dumps(self.to_vllm())}'",
      "transformers": f"config.update({json.dumps(self.to_hf())})",
    }


def _is_int(value) -> bool:
  """Whether the value counts; a NumPy integer does, a bool does not."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_count(name, value):
  if not _is_int(value) or value < 1:
    raise ValueError(f"`{name}` must be an integer above 0: got {value!r}.")
