# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Launches each kernel many times: a wrong barrier hangs rarely.

  python -m tests.gpu.soak [--launches=10000] [--calls=top_k] [--log=FILE]

Each call runs in a child process under a watchdog; every thousandth result is
compared with the first, bit by bit.
"""

import concurrent.futures
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags

from tests.gpu import calls, device

_LAUNCHES = flags.DEFINE_integer("launches", 10000, "Of each call.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Calls at the same time.")
_TIMEOUT = flags.DEFINE_integer("timeout", 300, "Seconds for one call.")
_LOG = flags.DEFINE_string("log", "", "Also write the log here.")
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/soak", "Where the output of each child goes."
)
_CHILD = flags.DEFINE_string("child", "", "Internal: the call of a child.")
_CALLS = flags.DEFINE_list("calls", list(calls.CALLS), "Calls.")
_COMPARE_EVERY = 1000


def main(_):
  if _CHILD.value:
    soak(*calls.CALLS[_CHILD.value](), _LAUNCHES.value)
    return
  calls.check(_CALLS.value)

  def run(name):
    return device.run_child(
      name,
      device.python(
        *("-m", "tests.gpu.soak", f"--child={name}"),
        f"--launches={_LAUNCHES.value}",
      ),
      timeout=_TIMEOUT.value,
      log_dir=pathlib.Path(_OUTPUT_DIR.value),
    )

  failed = 0
  with (
    device.log(_LOG.value) as tell,
    concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool,
  ):
    for child in pool.map(run, _CALLS.value):
      failed += not child.passed
      tell(child.line, *child.fault.splitlines())
    tell(f"{len(_CALLS.value) - failed} passed, {failed} failed")
  sys.exit(failed > 0)


def soak(function, args, launches):
  """Launches a call; raises AssertionError where a result differs."""
  function = jax.jit(function)
  first = jax.device_get(function(*args))
  for launch in range(1, launches + 1):
    out = function(*args)
    if launch % _COMPARE_EVERY == 0:
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(out), first)
  jax.block_until_ready(out)
  print(f"{launches} launches")


if __name__ == "__main__":
  app.run(main)
