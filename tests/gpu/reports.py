# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How a module of tests tells of its failures, and what is read of that."""

import re

_RULE = "=" * 70
_FAILURE = re.compile(
  rf"^{_RULE}\n((?:FAIL|ERROR): [^\n]*)\n(?:[^-=][^\n]*\n)*-{{70}}\n(.*?)"
  r"(?=^(?:=|-){70}$|\Z)",
  re.MULTILINE | re.DOTALL,
)
# Empty lines, unittest's rules, and log lines such as "I1128 18:58:21.575574".
_NOISE = re.compile(r"\s*$|[=-]{70}$|[IWEF]\d{4} \d\d:\d\d:")
_CASES = re.compile(r"^cases: (\d+)$", re.MULTILINE)
_LINES_A_FAILURE = 12


def failure(word: str, test, text: str) -> str:
  """How a failed test is told, as unittest would at its end.

  Args:
    word: "FAIL" or "ERROR".
    test: that failed.
    text: a traceback.
  """
  return f"\n{_RULE}\n{word}: {test}\n{'-' * 70}\n{text}{_RULE}"


def failures(output: str) -> list[str]:
  """Each failed test's name and what was wrong, from a module's output.

  Args:
    output: of `main` or of `absltest.main`.

  Returns:
    A few lines a failure: its name, the exception and the line that raised it.
  """
  return [
    _excerpt(name, text)
    for name, text in dict(_FAILURE.findall(output)).items()
  ]


def _excerpt(name, text):
  lines = [line for line in text.splitlines() if line.strip()]
  # The frames of a traceback are indented.
  begin = next(
    (
      i
      for i, line in enumerate(lines)
      if not line.startswith((" ", "Traceback"))
    ),
    0,
  )
  place = [line.strip() for line in lines[:begin] if "File " in line][-1:]
  return "\n".join([name, *place, *lines[begin:][:_LINES_A_FAILURE]])


def results(output: str) -> list[str]:
  """The lines of an output that are no log lines or rules."""
  return [line for line in output.splitlines() if not _NOISE.match(line)]


def num_cases(output: str) -> int:
  """Generated cases that a module's output counts."""
  return sum(map(int, _CASES.findall(output)))
