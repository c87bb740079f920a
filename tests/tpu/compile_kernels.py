# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel with the TPU's own compiler, on a machine without one.

  python -m tests.tpu.compile_kernels [--chips=v5e,v6e] [--ops=topk] [--subset]

A case fails on a rejection by the compiler (tiling, VMEM or SMEM overflow), on
temporary memory above its bound, and on a copy of the cache. Chips run in
child processes, for a failed check inside the compiler ends its process.
"""

import math
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from tests.tpu import cases as cases_lib
from tests.tpu import targets

_CHIPS = flags.DEFINE_list("chips", list(targets.CHIPS), "Chips.")
_OPS = flags.DEFINE_list("ops", list(cases_lib.OPS), "Ops.")
_NAME = flags.DEFINE_string("name", "", "Only cases with this in their name.")
_SUBSET = flags.DEFINE_bool("subset", False, "The few cases that CI compiles.")
_CHILD = flags.DEFINE_string("child", "", "Internal: the chip of a child.")
_TIMEOUT = flags.DEFINE_integer("timeout", 1800, "Seconds for one chip.")

# First words of a line, which the parent counts.
_PASSED, _FAILED = "passed", "FAILED"


def main(_):
  if _CHILD.value:
    compile_for(_CHILD.value)
    return
  passed = failed = 0
  for chip in _CHIPS.value:
    counts = run_child(chip)
    passed += counts[0]
    failed += counts[1]
  print(f"{passed} passed, {failed} failed")
  sys.exit(failed > 0 or passed == 0)


def chosen():
  """Cases that the flags ask for."""
  return [
    case
    for case in cases_lib.all_cases(_OPS.value)
    if _NAME.value in case.name and (case.subset or not _SUBSET.value)
  ]


def run_child(chip):
  """Compiles for one chip in a process of its own; counts its lines."""
  command = [
    *(sys.executable, "-m", "tests.tpu.compile_kernels", f"--child={chip}"),
    *(f"--ops={','.join(_OPS.value)}", f"--name={_NAME.value}"),
    f"--subset={_SUBSET.value}",
  ]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
  )
  passed = failed = 0
  begin = time.monotonic()
  try:
    for line in process.stdout:
      print(line, end="", flush=True)
      passed += line.startswith(_PASSED)
      failed += line.startswith(_FAILED)
      if time.monotonic() - begin > _TIMEOUT.value:
        process.kill()
  finally:
    process.kill()
  if process.wait():
    print(f"{_FAILED} {chip}: its process ended with {process.returncode}")
    failed += 1
  return passed, failed


def compile_for(chip):
  """Compiles the cases for `chip`, a line each."""
  log_dir = tempfile.mkdtemp()
  targets.set_environment(log_dir)
  try:
    for case in chosen():
      begin = time.monotonic()
      fault, facts = check(case, chip)
      label = f"{chip} {case.op} {case.name} {time.monotonic() - begin:.1f}s"
      if fault:
        print(f"{_FAILED} {label}: {fault}", flush=True)
      else:
        print(f"{_PASSED} {label} {facts}", flush=True)
  finally:
    shutil.rmtree(log_dir, ignore_errors=True)


def check(case, chip):
  """Compiles one case.

  Returns:
    What is wrong, or None; and a word on what it holds.
  """
  try:
    lowered = targets.lower_case(case, chip)
    if chip in case.rejected_on:
      return f"should be refused on {chip}", ""
    compiled = lowered.compile()
  except NotImplementedError as reason:
    if chip in case.rejected_on:
      return None, f"refused, as it should be: {reason}"
    return f"refused: {reason}", ""
  except Exception as error:
    # Any fault of the compiler is a result here, and the next case goes on.
    return f"{type(error).__name__}: {str(error)[:600]}", ""
  temp_bytes = compiled.memory_analysis().temp_size_in_bytes
  facts = f"temp {temp_bytes / 2**20:.1f} MiB"
  if temp_bytes > case.temp_bytes:
    bound = case.temp_bytes / 2**20
    return f"holds {facts}, more than {bound:.1f} MiB", facts
  text = compiled.as_text()
  missing = [name for name in case.kernels if f"{name}/pallas_call" not in text]
  if missing:
    return f"runs without the kernels {missing}", facts
  if case.cache is not None:
    name = targets.HLO_NAMES[case.cache.dtype.name]
    for dtype, shape in targets.copies(text):
      if dtype == name and math.prod(shape) >= case.cache.size:
        return f"copies the cache: {dtype}{list(shape)}", facts
  return None, facts


if __name__ == "__main__":
  app.run(main)
