# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is told of children that fail or hang, and of what a log is."""

import contextlib
import datetime
import io
import pathlib
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest

from tests.gpu import device, reports
from tests.kernels import pretended

_MODULE = """
import unittest
from tests.gpu import device

class Test(unittest.TestCase):
  def test_counted(self):
    device.count_cases(30)
    device.count_cases(12)
  def test_wrong(self):
    self.assertEqual(1, 2)
  def test_broken(self):
    raise KeyError("nothing")
  def test_parts(self):
    for i in range(3):
      with self.subTest(i=i):
        self.assertNotEqual(i, 1)

device.main()
"""
_OLD_OUTPUT = """\
[ RUN      ] Test.test_a
======================================================================
FAIL: test_a (tests.gpu.x.Test.test_a)
Test.test_a
----------------------------------------------------------------------
Traceback (most recent call last):
  File "x.py", line 3, in test_a
    np.testing.assert_allclose(a, b)
AssertionError:
Not equal to tolerance
Mismatched elements: 1 / 3

----------------------------------------------------------------------
Ran 1 test in 0.001s

FAILED (failures=1)
"""


class RunChildTest(absltest.TestCase):
  def run_child(self, script, timeout=60):
    self.log_dir = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    return device.run_child(
      "a child",
      device.python("-c", script),
      timeout=timeout,
      log_dir=self.log_dir,
    )

  def test_each_failure_is_told(self):
    child = self.run_child(_MODULE)
    self.assertFalse(child.passed)
    for word in (
      "FAIL: test_wrong",
      "AssertionError: 1 != 2",
      "ERROR: test_broken",
      "KeyError: 'nothing'",
      "(i=1)",
    ):
      self.assertIn(word, child.fault)
    self.assertNotIn("test_counted", child.fault)
    self.assertEqual(reports.num_cases(child.output), 42)
    self.assertIn("FAILED (failures=2, errors=1); cases: 42", child.line)
    self.assertLen(reports.failures(child.output), 3)

  def test_a_child_that_succeeds(self):
    child = self.run_child(
      "print('one'); print('I1128 18:58:21.575574 1 a.py:9] x');"
      " print(70 * '-'); print('two')"
    )
    self.assertTrue(child.passed)
    self.assertEqual(child.fault, "")
    self.assertRegex(child.line, r"^passed a child \d+s: one; two$")

  def test_a_child_that_hangs_is_killed_and_its_output_kept(self):
    begin = time.monotonic()
    child = self.run_child(
      "import subprocess, sys; print('at work', flush=True)\n"
      "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
      timeout=2,
    )
    self.assertLess(time.monotonic() - begin, 30)
    self.assertFalse(child.passed)
    self.assertIn("hung: killed after 2 s", child.fault)
    self.assertIn("at work", child.fault)
    log = (self.log_dir / "a_child.log").read_text()
    self.assertEqual(log, "at work\n")

  def test_a_child_that_crashes(self):
    child = self.run_child("import os; print('here', flush=True); os.abort()")
    self.assertIn("exit status -6", child.fault)
    self.assertIn("here", child.fault)


class FailuresTest(absltest.TestCase):
  def test_reads_absltests_own_output(self):
    (text,) = reports.failures(_OLD_OUTPUT)
    self.assertStartsWith(text, "FAIL: test_a (tests.gpu.x.Test.test_a)\n")
    self.assertIn('File "x.py", line 3', text)
    self.assertEndsWith(text, "Mismatched elements: 1 / 3")


class LogTest(absltest.TestCase):
  def facts(self, returncode=0):
    output = "flags were parsed\n0b9a82d012ab+\n1 x NVIDIA H200, jax 0.11.2\n"
    child = subprocess.CompletedProcess([], returncode, stdout=output)
    return mock.patch.object(device.subprocess, "run", return_value=child)

  def arguments(self, *arguments):
    words = ["/usr/bin/python3", "-m", "tests.gpu.soak", *arguments]
    return mock.patch.object(sys, "orig_argv", words)

  def test_header(self):
    with self.facts(), self.arguments("--jobs=4", "--calls=sparse_mla decode"):
      command, card = device.header()
    today = datetime.date.today().isoformat()
    self.assertEqual(
      command,
      "python -m tests.gpu.soak --jobs=4 '--calls=sparse_mla decode',"
      f" {today}, commit 0b9a82d012ab+",
    )
    self.assertEqual(card, "1 x NVIDIA H200, jax 0.11.2")

  def test_the_log_is_what_is_printed(self):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    path = folder / "new" / "soak.log"
    printed = io.StringIO()
    with (
      self.facts(),
      self.arguments(),
      contextlib.redirect_stdout(printed),
      device.log(str(path)) as tell,
    ):
      tell("one", "two")
      # Nothing is lost where the process is killed now.
      self.assertEndsWith(path.read_text(), "jax 0.11.2\none\ntwo\n")
    self.assertStartsWith(path.read_text(), "python -m tests.gpu.soak, 20")
    self.assertEqual(path.read_text(), printed.getvalue())

  def test_no_log(self):
    with (
      self.facts(),
      contextlib.redirect_stdout(io.StringIO()) as printed,
      device.log("") as tell,
    ):
      tell("one")
    self.assertEndsWith(printed.getvalue(), "\none\n")

  def test_nothing_runs_without_its_facts(self):
    with (
      self.facts(returncode=1),
      self.assertRaises(SystemExit),
      device.log(""),
    ):
      self.fail("the log was opened")

  def test_facts(self):
    with (
      pretended.gpu("NVIDIA H200"),
      contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
      device.print_facts()
    commit, card = printed.getvalue().splitlines()
    self.assertRegex(commit, r"^(unknown|[0-9a-f]{12}\+?)$")
    self.assertRegex(
      card, r"^\d+ x .+, jax \d\S*, jaxlib \d\S*, (.+, )?python 3[.\d]+$"
    )

  def test_no_facts_of_another_gpu(self):
    message = "no GPU to test: .* got NVIDIA B200"
    with (
      pretended.gpu("NVIDIA B200"),
      self.assertRaisesRegex(SystemExit, message),
    ):
      device.print_facts()


if __name__ == "__main__":
  absltest.main()
