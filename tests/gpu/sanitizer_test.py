# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How the sanitizer's output is read, and what is said where there is none."""

from unittest import mock

from absl.testing import absltest, parameterized

from tests.gpu import device, sanitizer

_CLEAN = {
  "memcheck": """\
========= COMPUTE-SANITIZER
1 launches
========= ERROR SUMMARY: 0 errors
""",
  "racecheck": """\
========= COMPUTE-SANITIZER
1 launches
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
""",
}
_ERROR = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at sparse_mla+0x4f0
=========     by thread (0,0,0) in block (3,0,0)
1 launches
========= ERROR SUMMARY: 3 errors
"""


def child(output, passed=True):
  fault = "" if passed else "  exit status 1"
  return device.Child("memcheck top_k", passed, 7.4, output, fault)


class VerdictTest(parameterized.TestCase):
  @parameterized.parameters(("memcheck", "errors"), ("racecheck", "hazards"))
  def test_clean(self, tool, noun):
    passed, line = sanitizer.verdict(tool, child(_CLEAN[tool]))
    self.assertTrue(passed)
    self.assertEqual(line, f"passed memcheck top_k 7s: 0 {noun}")

  def test_errors_are_told(self):
    passed, line = sanitizer.verdict("memcheck", child(_ERROR))
    self.assertFalse(passed)
    self.assertStartsWith(line, "FAILED memcheck top_k 7s: 3 errors\n")
    self.assertIn("at sparse_mla+0x4f0", line)

  @parameterized.parameters(
    ("1 launches\n", True, "memcheck wrote no summary"),
    ("========= ERROR SUMMARY: 0 errors\n", True, "did not come to its end"),
    (_CLEAN["memcheck"], False, "exit status 1"),
  )
  def test_nothing_found_is_not_enough(self, output, exit_status, message):
    passed, line = sanitizer.verdict("memcheck", child(output, exit_status))
    self.assertFalse(passed)
    self.assertIn(message, line)


class HasCrashedTest(parameterized.TestCase):
  @parameterized.parameters(
    ("", "  exit status -11", True),
    ("", "  exit status 1", False),
    ("", "", False),
    (_ERROR, "  exit status -11", False),
  )
  def test_a_signal_and_no_summary(self, output, fault, crashed):
    done = device.Child("memcheck top_k", not fault, 7.4, output, fault)
    self.assertEqual(sanitizer.has_crashed("memcheck", done), crashed)


class CheckTest(absltest.TestCase):
  def test_unknown_tool(self):
    with self.assertRaisesRegex(ValueError, r"`--tools`.*got \['leaks'\]"):
      sanitizer.check_tools(["leaks"])

  def test_no_sanitizer(self):
    message = "must be on PATH.*CUDA toolkit"
    with (
      mock.patch.object(sanitizer.shutil, "which", lambda _: None),
      self.assertRaisesRegex(ValueError, message),
    ):
      sanitizer.check_tools(["memcheck"])


if __name__ == "__main__":
  absltest.main()
