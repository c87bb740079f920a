# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the device tests of every op on the GPU that is here.

  python -m tests.gpu.run_tests [--ops=topk] [--log=FILE]

Each op runs in a child process under a watchdog: a kernel whose barrier is
wrong hangs, and holds its process.
"""

import datetime
import importlib.util
import pathlib
import subprocess
import sys
import time

from absl import app, flags

from tests.gpu import cases

_OPS = flags.DEFINE_list("ops", list(cases.OPS), "Ops.")
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
  failed = 0
  for op in _OPS.value:
    module = f"tests.gpu.{op}_device_test"
    if importlib.util.find_spec(module) is None:
      raise ValueError(f"`--ops` must be among {cases.OPS}: got {op!r}.")
    begin = time.monotonic()
    passed, end = run(module)
    failed += not passed
    word = "passed" if passed else "FAILED"
    lines.append(f"{word} {op} {time.monotonic() - begin:.0f}s: {end}")
    print(lines[-1], flush=True)
  if _LOG.value:
    path = pathlib.Path(_LOG.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  sys.exit(failed > 0)


def run(module):
  """Runs one module's tests.

  Returns:
    Whether all passed, and the last lines of what it printed.
  """
  process = subprocess.Popen(
    [sys.executable, "-m", module],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  try:
    output, _ = process.communicate(timeout=_TIMEOUT.value)
  except subprocess.TimeoutExpired:
    process.kill()
    output, _ = process.communicate()
    output += f"\nhung: killed after {_TIMEOUT.value} s"
  words = [line for line in output.splitlines() if line.strip()]
  if process.returncode:
    print(output, flush=True)
  return process.returncode == 0, "; ".join(words[-2:])


def _output(command):
  return subprocess.run(
    command, check=True, capture_output=True, text=True
  ).stdout


if __name__ == "__main__":
  app.run(main)
