# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a result comes from, as far as the standard library can tell."""

import pathlib
import shlex
import subprocess
import sys


def command() -> str:
  """This process's command line."""
  return shlex.join(["python", *sys.orig_argv[1:]])


def commit() -> str:
  """Commit of this source tree, with "+" if it was changed since."""
  root = pathlib.Path(__file__).resolve().parents[1]
  return output(
    *("git", "-C", str(root), "describe", "--always", "--exclude=*"),
    *("--abbrev=12", "--dirty=+"),
  )


def output(*words: str) -> str:
  """What another program prints; "unknown" without it or where it fails."""
  try:
    return subprocess.run(
      words, capture_output=True, text=True, check=True
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
