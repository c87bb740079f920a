# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a device test can run here; children that may hang."""

import os
import subprocess
import sys
import time
import unittest

from pallas_kernels.hopper import chip


def require_hopper():
  """Skips the module, for `setUpModule`, where there is no Hopper GPU."""
  try:
    chip.chip()
  except NotImplementedError as reason:
    raise unittest.SkipTest(str(reason)) from None


def run_child(name: str, *arguments: str, timeout: int) -> tuple[bool, str]:
  """Runs a module in a child process under a watchdog.

  A kernel whose barrier is wrong hangs, and holds its process.

  Args:
    name: for the line.
    *arguments: of Python.
    timeout: seconds, after which the child is killed.

  Returns:
    Whether it succeeded, and a line that says so with the end of its output.
    The whole output of a child that failed is printed.
  """
  begin = time.monotonic()
  flags = os.environ.get("XLA_FLAGS", "")
  process = subprocess.Popen(
    [sys.executable, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env={
      **os.environ,
      # Several children share the GPU's memory.
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
      # The references' speed is not their matter, and trying XLA's products
      # out takes longer than all else.
      "XLA_FLAGS": f"{flags} --xla_gpu_autotune_level=0",
    },
  )
  try:
    output, _ = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    output, _ = process.communicate()
    output += f"\nhung: killed after {timeout} s"
  passed = process.returncode == 0
  if not passed:
    print(output, flush=True)
  end = "; ".join([x for x in output.splitlines() if x.strip()][-2:])
  seconds = time.monotonic() - begin
  return (
    passed,
    f"{'passed' if passed else 'FAILED'} {name} {seconds:.0f}s: {end}",
  )
