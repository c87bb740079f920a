# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The card's clock and power while a benchmark runs, by nvidia-smi."""

import os
import shutil
import statistics
import subprocess
import threading
import time
from typing import NamedTuple

_EVERY_MS = 100
_COMMAND = (
  "nvidia-smi",
  "--query-gpu=clocks.sm,power.draw",
  "--format=csv,noheader,nounits",
  f"--loop-ms={_EVERY_MS}",
)


class Sample(NamedTuple):
  """At a moment.

  Attributes:
    seconds: of `time.perf_counter`.
    sm_mhz: of the multiprocessors.
    watts: drawn.
  """

  seconds: float
  sm_mhz: float
  watts: float


class ClockLog:
  """Samples ten times a second, from `with` to its end.

  The power limit holds a card's clock below its highest: two times of one
  program compare only at like clocks. Without nvidia-smi there are no samples.
  """

  def __init__(self):
    """Starts nothing yet."""
    self._samples: list[Sample] = []
    self._process = None

  def __enter__(self) -> "ClockLog":
    """Starts nvidia-smi."""
    if shutil.which(_COMMAND[0]):
      self._process = subprocess.Popen(
        [*_COMMAND, f"--id={_device()}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
      )
      threading.Thread(target=self._read, daemon=True).start()
    return self

  def __exit__(self, *_):
    """Ends it."""
    if self._process is not None:
      self._process.terminate()
      self._process.wait()

  def _read(self):
    for line in self._process.stdout:
      try:
        sm_mhz, watts = map(float, line.split(","))
      except ValueError:
        # Some cards and machines have no such sensor: "[N/A]".
        continue
      self._samples.append(Sample(time.perf_counter(), sm_mhz, watts))

  def since(self, begin: float) -> dict[str, float]:
    """Means since a time of `time.perf_counter`; nothing without a sample."""
    samples = [s for s in list(self._samples) if s.seconds >= begin]
    if not samples:
      return {}
    return {
      "sm_mhz": statistics.mean(s.sm_mhz for s in samples),
      "watts": statistics.mean(s.watts for s in samples),
    }


def _device() -> str:
  """The first that CUDA shows, as a number or an identifier."""
  return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
