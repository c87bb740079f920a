# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Single fields of an untrusted JSON object, with their bounds."""

from collections.abc import Mapping
from typing import Any

from indexcache_jax.checkpoints import errors

CheckpointError = errors.CheckpointError


def integer(
  raw: Mapping[str, Any],
  field: str,
  low: int,
  high: int,
  *,
  default: int | None = None,
) -> int:
  """Returns an integer from `low` to `high`; null counts as absent.

  Raises:
    CheckpointError: if it is none, out of bounds, or absent and without a
      default.
  """
  value = raw.get(field)
  if value is None and default is not None:
    return default
  # `type`, not isinstance: true is no number.
  if type(value) is not int or not low <= value <= high:
    raise CheckpointError(
      f"`{field}` must be an integer from {low} to {high}: got"
      f" {_show(value)} in config.json."
    )
  return value


def number(
  raw: Mapping[str, Any],
  field: str,
  low: float,
  high: float,
  *,
  default: float | None = None,
) -> float:
  """Returns a number from `low` to `high` as a float, else see `integer`."""
  value = raw.get(field)
  if value is None and default is not None:
    return default
  # The comparison is false for NaN, and exact for integers of any size.
  if type(value) not in (int, float) or not low <= value <= high:
    raise CheckpointError(
      f"`{field}` must be a number from {low:g} to {high:g}: got"
      f" {_show(value)} in config.json."
    )
  return float(value)


def boolean(
  raw: Mapping[str, Any], field: str, default: bool | None
) -> bool | None:
  """Returns true or false, the default where it is absent or null."""
  value = raw.get(field)
  if value is None:
    return default
  if not isinstance(value, bool):
    raise CheckpointError(
      f"`{field}` must be true or false: got {_show(value)} in config.json."
    )
  return value


def _show(value) -> str:
  if value is None:
    return "nothing"
  if type(value) is int and value.bit_length() > 128:
    return f"an integer of {value.bit_length()} bits"
  return f"{value!r:.80}"
