# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the device tests of every op on the GPU that is here.

  python -m tests.gpu.run_tests [--ops=topk] [--log=FILE]

Each op runs in a child process under a watchdog.
"""

import concurrent.futures
import datetime
import importlib.util
import pathlib
import subprocess
import sys

from absl import app, flags

from tests.gpu import cases, device

_OPS = flags.DEFINE_list("ops", list(cases.OPS), "Ops.")
_JOBS = flags.DEFINE_integer(
  "jobs", 1, "Ops tested at the same time.", lower_bound=1
)
_LOG = flags.DEFINE_string("log", "", "Also write the summary here.")
_TIMEOUT = flags.DEFINE_integer("timeout", 900, "Seconds for one op.")

_VERSIONS = """
import jax, jaxlib
print(jax.devices()[0].device_kind, "jax", jax.__version__, "jaxlib",
      jaxlib.__version__, jax.devices()[0].client.platform_version)
"""


def main(_):
  lines = [
    f"python -m tests.gpu.run_tests, {datetime.date.today().isoformat()}",
    " ".join(_output([sys.executable, "-c", _VERSIONS]).split()),
  ]
  for op in _OPS.value:
    if importlib.util.find_spec(_module(op)) is None:
      raise ValueError(f"`--ops` must be among {cases.OPS}: got {op!r}.")
  failed = 0
  with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
    for passed, line in pool.map(run, _OPS.value):
      failed += not passed
      lines.append(line)
      print(line, flush=True)
  if _LOG.value:
    path = pathlib.Path(_LOG.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  sys.exit(failed > 0)


def _module(op):
  return f"tests.gpu.{op}_device_test"


def run(op):
  """Runs one op's tests; whether all passed, and a line."""
  return device.run_child(op, "-m", _module(op), timeout=_TIMEOUT.value)


def _output(command):
  return subprocess.run(
    command, check=True, capture_output=True, text=True
  ).stdout


if __name__ == "__main__":
  app.run(main)
