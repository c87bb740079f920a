# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The error of this package, and how it lists many faults at once."""

from collections.abc import Iterable

# Enough to see a pattern; a wrong depth can make 100,000 faults.
_LISTED = 40


class CheckpointError(ValueError):
  """A checkpoint is not what it must be; the message says what, and why."""


def list_faults(title: str, faults: Iterable[str]) -> str:
  """Returns `title` with one indented line a fault; empty without faults."""
  faults = list(faults)
  if not faults:
    return ""
  lines = [f"{title} ({len(faults)}):"]
  lines += [f"  {fault}" for fault in faults[:_LISTED]]
  if len(faults) > _LISTED:
    lines.append(f"  ... and {len(faults) - _LISTED} more")
  return "\n".join(lines)
