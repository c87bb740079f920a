# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What compute-sanitizer's tools say, and where they are missing."""

import re
import shutil

from tests.gpu import device

COMMAND = "compute-sanitizer"
# What each tool finds, as it says at its end.
TOOLS = {
  "memcheck": ("errors", re.compile(r"ERROR SUMMARY: (\d+) error")),
  "racecheck": ("hazards", re.compile(r"RACECHECK SUMMARY: (\d+) hazard")),
}
_LINES = 12


def check_tools(tools: list[str]):
  """Raises ValueError for an unknown tool, or where there is no sanitizer."""
  unknown = [tool for tool in tools if tool not in TOOLS]
  if unknown:
    raise ValueError(f"`--tools` must be among {list(TOOLS)}: got {unknown}.")
  if shutil.which(COMMAND) is None:
    raise ValueError(
      f"`{COMMAND}` must be on PATH, and is not. It comes with the CUDA"
      " toolkit, in /usr/local/cuda/bin or /usr/local/cuda/compute-sanitizer."
    )


def has_crashed(tool: str, child: device.Child) -> bool:
  """Whether a signal ended the process before the tool said anything.

  compute-sanitizer does that now and then, to another call each time.
  """
  return "exit status -" in child.fault and not TOOLS[tool][1].search(
    child.output
  )


def verdict(tool: str, child: device.Child) -> tuple[bool, str]:
  """Whether a tool found nothing, and what it found, in a line or more."""
  noun, summary = TOOLS[tool]
  # One of each process.
  counts = [int(count) for count in summary.findall(child.output)]
  has_run = "1 launches" in child.output
  if not counts:
    what = f"{tool} wrote no summary"
  elif not has_run:
    what = "the call did not come to its end"
  else:
    what = f"{sum(counts)} {noun}"
  passed = child.passed and has_run and bool(counts) and not any(counts)
  word = "passed" if passed else "FAILED"
  line = f"{word} {child.name} {child.seconds:.0f}s: {what}"
  if passed:
    return True, line
  return False, "\n".join([line, *_findings(child.output), child.fault])


def _findings(output):
  """The first lines of what the tool found."""
  lines = [line for line in output.splitlines() if line.startswith("=========")]
  return [f"  {line}" for line in lines if "COMPUTE" not in line][:_LINES]
