# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs each small call once under NVIDIA's compute-sanitizer.

  python -m tests.gpu.sanitize [--tools=memcheck,racecheck] [--calls=top_k]
    [--log=FILE]

memcheck finds accesses out of bounds, racecheck threads of a block that touch
shared memory without a barrier between them. A tool makes a kernel hundreds of
times slower: the calls are small, and each has a watchdog.
"""

import concurrent.futures
import itertools
import pathlib
import sys

from absl import app, flags

from tests.gpu import calls, device, sanitizer

_CHOSEN = flags.DEFINE_list("tools", list(sanitizer.TOOLS), "Tools.")
_CALLS = flags.DEFINE_list("calls", list(calls.CALLS), "Calls.")
_JOBS = flags.DEFINE_integer(
  "jobs", 1, "Calls at the same time.", lower_bound=1
)
_TIMEOUT = flags.DEFINE_integer("timeout", 300, "Seconds for one call.")
_LOG = flags.DEFINE_string("log", "", "Also write the log here.")
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/sanitize", "Where the output of each child goes."
)


def main(_):
  calls.check(_CALLS.value)
  sanitizer.check_tools(_CHOSEN.value)
  runs = list(itertools.product(_CHOSEN.value, _CALLS.value))
  failed = 0
  with (
    device.log(_LOG.value) as tell,
    concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool,
  ):
    children = pool.map(lambda run: sanitize(*run), runs)
    for (tool, _), child in zip(runs, children, strict=True):
      passed, line = sanitizer.verdict(tool, child)
      failed += not passed
      tell(line)
    tell(f"{len(runs) - failed} passed, {failed} failed")
  sys.exit(failed > 0)


def sanitize(tool: str, call: str) -> device.Child:
  """Runs one call under one tool; once more where the tool itself crashed."""
  child = _run(tool, call, f"{tool} {call}")
  if sanitizer.has_crashed(tool, child):
    child = _run(tool, call, f"{tool} {call} (second try: a crash)")
  return child


def _run(tool, call, name):
  return device.run_child(
    name,
    [
      *(sanitizer.COMMAND, "--tool", tool, "--target-processes", "all"),
      *device.python("-m", "tests.gpu.soak", f"--child={call}", "--launches=1"),
    ],
    timeout=_TIMEOUT.value,
    log_dir=pathlib.Path(_OUTPUT_DIR.value),
  )


if __name__ == "__main__":
  app.run(main)
