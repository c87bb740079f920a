# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is told of children that fail or hang."""

import pathlib
import tempfile
import time

from absl.testing import absltest

from tests.gpu import device

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
    self.assertEqual(device.num_cases(child.output), 42)
    self.assertIn("FAILED (failures=2, errors=1); cases: 42", child.line)
    self.assertLen(device.failures(child.output), 3)

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
    (text,) = device.failures(_OLD_OUTPUT)
    self.assertStartsWith(text, "FAIL: test_a (tests.gpu.x.Test.test_a)\n")
    self.assertIn('File "x.py", line 3', text)
    self.assertEndsWith(text, "Mismatched elements: 1 / 3")


if __name__ == "__main__":
  absltest.main()
