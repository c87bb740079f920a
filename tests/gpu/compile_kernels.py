# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles every GPU kernel for sm_90a, on a machine without a GPU.

  python -m tests.gpu.compile_kernels [--ops=topk] [--name=128k] [--subset]
    [--log=FILE]

Through ptxas, which refuses what lowering alone accepts. A case fails on an
error, on a register spill, on temporary memory above its bound and on machine
code that ptxas is known to get wrong.
"""

import contextlib
import ctypes
import datetime
import os
import pathlib
import re
import sys
import tempfile
import time

from absl import app, flags

from experiments import provenance
from tests.gpu import targets

targets.set_environment()
# Mosaic GPU prints ptxas's report of each kernel.
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

from tests.gpu import cases as cases_lib  # noqa: E402
from tests.gpu import disassembly  # noqa: E402

_OPS = flags.DEFINE_list("ops", list(cases_lib.OPS), "Ops.")
_NAME = flags.DEFINE_string("name", "", "Only cases with this in their name.")
_SUBSET = flags.DEFINE_bool("subset", False, "The few cases that CI compiles.")
_LOG = flags.DEFINE_string("log", "", "Also write what is printed here.")

_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def main(_):
  disassembly.set_environment()
  lines = []

  def tell(line):
    print(line, flush=True)
    lines.append(line)

  tell(header())
  chosen = [
    case
    for case in cases_lib.all_cases(_OPS.value)
    if _NAME.value in case.name and (case.subset or not _SUBSET.value)
  ]
  failed = 0
  for case in chosen:
    begin = time.monotonic()
    fault, facts = check(case)
    failed += fault is not None
    word = "passed" if fault is None else "FAILED"
    seconds = time.monotonic() - begin
    tell(f"{word} {case.op} {case.name} {seconds:.1f}s {fault or facts}")
  tell(f"{len(chosen) - failed} passed, {failed} failed")
  if _LOG.value:
    path = pathlib.Path(_LOG.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  sys.exit(failed > 0 or not chosen)


def header() -> str:
  """The command, the versions and the commit, "+" if it was changed since."""
  import jax
  import jaxlib

  return (
    f"{provenance.command()}, {datetime.date.today()}\n"
    f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, sm_90a,"
    f" commit {provenance.commit()}"
  )


def check(case):
  """Compiles one case.

  Returns:
    What is wrong, or None; and a word on its kernels.
  """
  report = []
  try:
    with native_output(report):
      compiled = targets.compile_for_h200(case.function, *case.arguments)
  except Exception as error:
    # Any fault of the compiler is a result here, and the next case goes on.
    last = report[-1][-1500:] if report else ""
    return f"{type(error).__name__}: {str(error)[:600]}\n{last}", ""
  text = "".join(report)
  wrong_code = disassembly.fault(text)
  if wrong_code:
    return wrong_code, ""
  spills = [int(stores) + int(loads) for stores, loads in _SPILL.findall(text)]
  registers = _REGISTERS.findall(text)
  temp_bytes = compiled.memory_analysis().temp_size_in_bytes
  facts = (
    f"{len(registers)} kernels, registers {'/'.join(registers)},"
    f" temp {temp_bytes / 2**20:.1f} MiB"
  )
  if not registers:
    return "no kernel was compiled: nothing to report on", facts
  if max(spills, default=0) > case.spill_bytes:
    return f"spills {max(spills)} bytes; {facts}", facts
  if temp_bytes > case.temp_bytes:
    bound = case.temp_bytes / 2**20
    return f"holds more than {bound:.1f} MiB; {facts}", facts
  return None, facts


@contextlib.contextmanager
def native_output(report):
  """Appends what compiled code prints, past `sys.stdout`, to `report`."""
  libc = ctypes.CDLL(None)
  sys.stdout.flush()
  sys.stderr.flush()
  saved = os.dup(1), os.dup(2)
  with tempfile.TemporaryFile() as file:
    try:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
      yield
    finally:
      libc.fflush(None)
      os.dup2(saved[0], 1)
      os.dup2(saved[1], 2)
      os.close(saved[0])
      os.close(saved[1])
      file.seek(0)
      report.append(file.read().decode(errors="replace"))


if __name__ == "__main__":
  app.run(main)
