# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What device tests share: whether they can run, how they report.

Also their children: a kernel may hang, and takes its process with it.
"""

import contextlib
import dataclasses
import datetime
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import traceback
import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping

import jaxlib
from absl.testing import absltest

from experiments import provenance
from pallas_kernels.hopper import chip
from tests.gpu import reports

# Of the output of a child that did not get as far as a failure.
_LAST_LINES = 15

_num_cases = 0


def require_hopper():
  """Skips the module, for `setUpModule`, where there is no Hopper GPU."""
  try:
    chip.chip()
  except NotImplementedError as reason:
    raise unittest.SkipTest(str(reason)) from None


def count_cases(number: int):
  """Adds to the generated cases that `main` counts at its end."""
  global _num_cases
  _num_cases += number


def main():
  """Runs a module's tests; tells each failure at once, not at the end.

  A later kernel may hang, and what stands at the end is never printed then.
  """
  runner = unittest.TextTestRunner(
    sys.stdout, verbosity=2, resultclass=_PromptResult
  )
  try:
    absltest.main(testRunner=runner)
  finally:
    print(f"cases: {_num_cases}", flush=True)


class _PromptResult(unittest.TextTestResult):
  """Prints a failure where it happens, and the seconds of each test."""

  def getDescription(self, test):
    return str(test)

  def startTest(self, test):
    self._begin = time.monotonic()
    super().startTest(test)

  def stopTest(self, test):
    super().stopTest(test)
    self._tell(f"  {time.monotonic() - self._begin:.1f}s")

  def addError(self, test, err):
    super().addError(test, err)
    self._tell_failure("ERROR", test, err)

  def addFailure(self, test, err):
    super().addFailure(test, err)
    self._tell_failure("FAIL", test, err)

  def addSubTest(self, test, subtest, err):
    super().addSubTest(test, subtest, err)
    if err is not None:
      is_failure = issubclass(err[0], test.failureException)
      self._tell_failure("FAIL" if is_failure else "ERROR", subtest, err)

  def printErrors(self):
    """Nothing: each was told."""

  def _tell_failure(self, word, test, err):
    text = "".join(traceback.format_exception(*err))
    self._tell(reports.failure(word, test, text))

  def _tell(self, text):
    self.stream.writeln(text)
    self.stream.flush()


@dataclasses.dataclass(frozen=True)
class Child:
  """A child process that has ended.

  Attributes:
    name: of the child.
    passed: whether it succeeded.
    seconds: that it took.
    output: all that it wrote.
    fault: "", or what is to be said of its failure.
  """

  name: str
  passed: bool
  seconds: float
  output: str
  fault: str

  @property
  def line(self) -> str:
    """One line: name, seconds, and the end of what is no log line or rule."""
    word = "passed" if self.passed else "FAILED"
    end = "; ".join(reports.results(self.output)[-3:])
    return f"{word} {self.name} {self.seconds:.0f}s: {end}"


@contextlib.contextmanager
def log(path: str) -> Iterator[Callable[..., None]]:
  """Opens a run's log, which begins with `header`.

  Args:
    path: of the file; "": none.

  Yields:
    What prints lines and writes them to the file, at once.
  """
  first = header()
  with contextlib.ExitStack() as stack:
    streams = [sys.stdout]
    if path:
      pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
      streams.append(stack.enter_context(open(path, "w", encoding="utf-8")))

    def tell(*lines):
      for stream in streams:
        print(*lines, sep="\n", file=stream, flush=True)

    tell(*first)
    yield tell


def header() -> list[str]:
  """This process's command, date and commit; its card and versions.

  Asked of a child: this process holds no GPU memory. Ends the process where
  there is no Hopper GPU: the ops would run without their kernels.
  """
  facts = subprocess.run(
    python("-c", "from tests.gpu import device; device.print_facts()"),
    stdout=subprocess.PIPE,
    text=True,
  )
  if facts.returncode:
    sys.exit(facts.returncode)
  commit, card = facts.stdout.splitlines()[-2:]
  command = provenance.command()
  return [f"{command}, {datetime.date.today()}, commit {commit}", card]


def print_facts():
  """Prints what `header` asks: a line of the commit, and one of the card."""
  # Defines flags, which the tests' own processes need not have.
  from experiments import common

  try:
    chip.chip()
  except NotImplementedError as reason:
    sys.exit(f"There is no GPU to test: {reason}")
  facts = {**common.environment(), "jaxlib": jaxlib.__version__}
  print(facts["commit"])
  names = ("jax", "jaxlib", "cuda", "driver", "python")
  versions = [f"{name} {facts[name]}" for name in names if name in facts]
  print(facts["device"], *versions, sep=", ")


def python(*arguments: str) -> list[str]:
  """The command of this Python with arguments."""
  return [sys.executable, *arguments]


def run_child(
  name: str,
  command: list[str],
  *,
  timeout: float,
  log_dir: pathlib.Path,
  environment: Mapping[str, str] | None = None,
) -> Child:
  """Runs a command in a child process under a watchdog.

  Args:
    name: of the child, and of its log `<log_dir>/<name>.log`. What the child
      writes is there at once: whoever kills this process loses nothing.
    command: to run.
    timeout: seconds, after which the child and its children are killed.
    log_dir: made if it is missing.
    environment: added to this process's.
  """
  log_dir.mkdir(parents=True, exist_ok=True)
  log = log_dir / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.log"
  begin = time.monotonic()
  flags = os.environ.get("XLA_FLAGS", "")
  with log.open("w", encoding="utf-8") as file:
    process = subprocess.Popen(
      command,
      stdout=file,
      stderr=subprocess.STDOUT,
      env={
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        # Several children share the GPU's memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # The references' speed is not their matter, and trying XLA's products
        # out takes longer than all else.
        "XLA_FLAGS": f"{flags} --xla_gpu_autotune_level=0",
        **(environment or {}),
      },
    )
    try:
      process.wait(timeout)
      hung = []
    except subprocess.TimeoutExpired:
      _kill_tree(process.pid)
      process.wait()
      hung = [f"hung: killed after {timeout:g} s"]
  output = log.read_text(encoding="utf-8", errors="replace")
  passed = process.returncode == 0
  return Child(
    name=name,
    passed=passed,
    seconds=time.monotonic() - begin,
    output=output,
    fault="" if passed else _fault(output, process.returncode, hung),
  )


def _fault(output, exit_status, hung):
  found = reports.failures(output)
  if hung or not found:
    hung = hung or [f"exit status {exit_status}"]
    found += ["\n".join(output.splitlines()[-_LAST_LINES:])]
  return "\n".join(_indented([*hung, *found]))


def _indented(texts: Iterable[str]):
  for text in texts:
    first, *others = text.splitlines() or [""]
    yield "\n".join([f"  {first}", *(f"    {line}" for line in others)])


def _kill_tree(pid):
  """Kills a process and its descendants.

  Not by a process group: what kills this process's group, as `timeout` does,
  is to reach the children too.
  """
  children = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  try:
    descendants = children.read_text().split()
  except OSError:
    descendants = []
  # It may have ended by itself.
  with contextlib.suppress(ProcessLookupError):
    os.kill(pid, signal.SIGKILL)
  for child in descendants:
    _kill_tree(int(child))
