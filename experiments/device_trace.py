# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What ran on a GPU, and when, from a trace of JAX's profiler."""

import collections
import os
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import jax

# Without it XLA runs no CUDA graphs while a trace is taken, and a program of
# small kernels is then bound by their launches.
XLA_FLAG = "--xla_enable_command_buffers_during_profiling=true"


class Event(NamedTuple):
  """A kernel or a copy.

  Attributes:
    start_ns: on the trace's own clock.
    duration_ns: of it.
    name: XLA's.
  """

  start_ns: float
  duration_ns: float
  name: str


def require_flag() -> None:
  """Raises ValueError where `XLA_FLAGS` lacks `XLA_FLAG`."""
  flags = os.environ.get("XLA_FLAGS", "")
  if XLA_FLAG not in flags.split():
    raise ValueError(
      f"A trace needs {XLA_FLAG} in XLA_FLAGS, or it shows a program without"
      f" its CUDA graphs: got XLA_FLAGS={flags!r}."
    )


def read(folder: pathlib.Path) -> list[Event]:
  """The events of all GPUs' streams of the folder's latest trace, in order.

  Raises:
    ValueError: no trace, or none of a GPU.
  """
  paths = sorted(
    folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime
  )
  if not paths:
    raise ValueError(f"`folder` holds no trace (*.xplane.pb): got {folder}.")
  events = [
    Event(event.start_ns, event.duration_ns, event.name)
    for plane in jax.profiler.ProfileData.from_file(str(paths[-1])).planes
    if "GPU" in plane.name
    for line in plane.lines
    if line.name.startswith("Stream")
    for event in line.events
  ]
  if not events:
    raise ValueError(
      f"The trace holds no event of a GPU's stream: got {paths[-1]}. JAX must"
      " run on the GPU while it is taken."
    )
  return sorted(events)


def busy_ns(events: Iterable[Event]) -> float:
  """Time in which something runs: events of several streams may overlap."""
  busy = end = 0.0
  for event in sorted(events):
    stop = event.start_ns + event.duration_ns
    busy += max(0.0, stop - max(event.start_ns, end))
    end = max(end, stop)
  return busy


class Total(NamedTuple):
  """All events of a name.

  Attributes:
    name: without the number that XLA gives each of a kind.
    count: of the events.
    duration_ns: together.
  """

  name: str
  count: int
  duration_ns: float


def totals(events: Iterable[Event]) -> list[Total]:
  """Sums by name, the longest first."""
  counts, times = collections.Counter(), collections.Counter()
  for event in events:
    name = re.sub(r"[_.]\d+$", "", event.name)
    counts[name] += 1
    times[name] += event.duration_ns
  return [
    Total(name, counts[name], duration)
    for name, duration in times.most_common()
  ]
