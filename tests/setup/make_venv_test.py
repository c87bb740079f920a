# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import subprocess
import tempfile

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parents[2]


def make_venv(*args, **env):
  return subprocess.run(
    [str(_ROOT / "tools" / "make_venv"), *args],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | env,
  )


class MakeVenvTest(absltest.TestCase):
  def test_finds_a_python_new_enough(self):
    found = make_venv("--find", "3.12")
    self.assertEqual(found.returncode, 0, found.stderr)
    version = subprocess.run(
      [found.stdout.strip(), "-c", "import sys; print(*sys.version_info[:2])"],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.split()
    self.assertGreaterEqual(tuple(map(int, version)), (3, 12))

  def test_finds_one_in_pyenvs_versions_folder_alone(self):
    found = make_venv("--find", "3.12")
    with tempfile.TemporaryDirectory() as folder:
      link = pathlib.Path(folder) / "versions" / "3.12.9" / "bin" / "python"
      link.parent.mkdir(parents=True)
      link.symlink_to(found.stdout.strip())
      # A PATH with a shell and its tools, but no Python of ours.
      tools = pathlib.Path(folder) / "tools"
      tools.mkdir()
      for name in ("env", "bash", "ls", "cat", "rm"):
        (tools / name).symlink_to(f"/bin/{name}")
      again = make_venv("--find", "3.12", PATH=str(tools), PYENV_ROOT=folder)
      self.assertEqual(again.stdout.strip(), str(link), again.stderr)

  def test_says_what_to_install_where_there_is_none(self):
    missing = make_venv("--find", "3.99")
    self.assertEqual(missing.returncode, 1)
    self.assertIn("A Python 3.99 or newer", missing.stderr)
    self.assertIn("pyenv install 3.99", missing.stderr)
    exact = make_venv("--find", "=3.99")
    self.assertIn("A Python 3.99 with", exact.stderr)

  def test_a_failed_set_up_leaves_nothing_behind(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "venv"
      failed = make_venv(
        str(path), "3.12", "--no-index", "no-such-package-at-all"
      )
      self.assertNotEqual(failed.returncode, 0)
      self.assertFalse(path.exists())


if __name__ == "__main__":
  absltest.main()
