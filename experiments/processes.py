# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Commands that need each other's results, several at a time on a device."""

import collections
import dataclasses
import math
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Literal

Outcome = Literal["done", "unfinished", "failed", "not started"]

_POLL_SECONDS = 0.2
_SHOWN_LINES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A command and what it leaves.

  Attributes:
    name: of the task, in letters, digits and underscores.
    command: with its arguments, a function of the minutes that are left.
    is_done: whether what it leaves is there, so that it need not run, or ran to
      its end. None: it runs every time, and is done if the command ends well.
    needs: names of tasks that must be done before.
    trains: whether it takes one of a device's places; else one of the
      compilers'.
  """

  name: str
  command: Callable[[float], Sequence[str]]
  is_done: Callable[[], bool] | None = None
  needs: Sequence[str] = ()
  trains: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
  """How many tasks run at the same time.

  Attributes:
    devices: CUDA's numbers of those to use; each task sees one.
    per_device: tasks that train on a device.
    compilers: tasks that do not train, in all.
  """

  devices: Sequence[str]
  per_device: int
  compilers: int


class Runner:
  """Starts tasks as soon as what they need is done and there is a place."""

  def __init__(
    self,
    tasks: Sequence[Task],
    places: Places,
    log_dir: str | os.PathLike,
    deadline: float = math.inf,
  ):
    """Checks the tasks.

    Args:
      tasks: in the order in which they are preferred.
      places: for them.
      log_dir: of a file a task, with what it prints.
      deadline: by `time.monotonic`; after it no task is started.

    Raises:
      ValueError: a name that occurs twice, or a need that is no task.
    """
    self._tasks = {task.name: task for task in tasks}
    self._places = places
    self._log_dir = pathlib.Path(log_dir)
    self._deadline = deadline
    self._running: dict[str, tuple[subprocess.Popen, str]] = {}
    self._outcomes: dict[str, Outcome] = {}
    self._started: dict[str, float] = {}
    if len(self._tasks) < len(tasks):
      raise ValueError("Tasks must have different names: got one twice.")
    for task in tasks:
      for need in task.needs:
        if need not in self._tasks:
          raise ValueError(
            f"{task.name!r} must need tasks that are there: got {need!r}."
          )

  def run(self) -> dict[str, Outcome]:
    """Runs all that can be run; returns what became of each task.

    A task whose command ends well without its result is "unfinished", as when
    its own time is up; what needs it is "not started".
    """
    self._log_dir.mkdir(parents=True, exist_ok=True)
    self._outcomes = {
      name: "done"
      for name, task in self._tasks.items()
      if task.is_done is not None and task.is_done()
    }
    try:
      while self._start_ready() or self._running:
        self._collect()
        time.sleep(_POLL_SECONDS)
    finally:
      for process, _ in self._running.values():
        process.terminate()
    return {
      name: self._outcomes.get(name, "not started") for name in self._tasks
    }

  def _start_ready(self):
    """Starts tasks while there are places; returns whether it started any."""
    started = False
    if time.monotonic() > self._deadline:
      return started
    for task in self._tasks.values():
      is_waiting = (
        task.name not in self._outcomes and task.name not in self._running
      )
      if is_waiting and all(
        self._outcomes.get(need) == "done" for need in task.needs
      ):
        device = self._free_device(task)
        if device is not None:
          self._start(task, device)
          started = True
    return started

  def _free_device(self, task):
    """The device with the fewest tasks of this kind, None if all are full."""
    taken = collections.Counter(
      device
      for name, (_, device) in self._running.items()
      if self._tasks[name].trains == task.trains
    )
    device = min(self._places.devices, key=lambda x: taken[x])
    if task.trains:
      return device if taken[device] < self._places.per_device else None
    return device if taken.total() < self._places.compilers else None

  def _start(self, task, device):
    print(f"{task.name}: started on device {device}.", flush=True)
    self._started[task.name] = time.monotonic()
    with self._log_path(task.name).open("w", encoding="utf-8") as log:
      process = subprocess.Popen(
        list(task.command((self._deadline - time.monotonic()) / 60)),
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": device},
      )
    self._running[task.name] = process, device

  def _collect(self):
    """Notes the outcomes of the tasks that have ended."""
    for name, (process, _) in list(self._running.items()):
      if process.poll() is None:
        continue
      del self._running[name]
      seconds = time.monotonic() - self._started[name]
      self._outcomes[name] = outcome = _outcome(
        process.returncode, self._tasks[name]
      )
      print(f"{name}: {outcome} after {seconds:.0f} s.", flush=True)
      if outcome == "failed":
        lines = self._log_path(name).read_text(errors="replace").splitlines()
        print(f"{self._log_path(name)} ends with")
        print("\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:]))

  def _log_path(self, name):
    return self._log_dir / f"{name}.log"


def _outcome(returncode, task) -> Outcome:
  if returncode:
    return "failed"
  return "done" if task.is_done is None or task.is_done() else "unfinished"
