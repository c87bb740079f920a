# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import pathlib
import sys
import tempfile
import time

from absl.testing import absltest

from experiments import processes

_PLACES = processes.Places(devices=("2", "5"), per_device=1, compilers=1)


class ProcessesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def task(self, name, code="", **kwargs):
    """Writes its device into a file of its name, after `code`."""
    path = self.folder / name
    code = f"import os, pathlib\n{code}\npathlib.Path({str(path)!r})"
    code += ".write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    return processes.Task(
      name=name,
      command=lambda minutes: [sys.executable, "-c", code],
      is_done=path.exists,
      **kwargs,
    )

  def run_tasks(self, *tasks, **kwargs):
    runner = processes.Runner(tasks, _PLACES, self.folder / "logs", **kwargs)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      outcomes = runner.run()
    return outcomes, printed.getvalue()

  def test_order_and_devices(self):
    needs_both = f"assert pathlib.Path({str(self.folder / 'a')!r}).exists()"
    outcomes, _ = self.run_tasks(
      self.task("last", needs_both, needs=["a", "b"]),
      self.task("a", "import time; time.sleep(1)"),
      self.task("b", "import time; time.sleep(1)"),
    )
    self.assertEqual(set(outcomes.values()), {"done"})
    devices = {(self.folder / name).read_text() for name in "ab"}
    self.assertEqual(devices, {"2", "5"})

  def test_a_failure_stops_what_needs_it_alone(self):
    outcomes, printed = self.run_tasks(
      self.task("bad", "raise ValueError('no')"),
      self.task("next", needs=["bad"]),
      self.task("other"),
    )
    self.assertEqual(
      outcomes, {"bad": "failed", "next": "not started", "other": "done"}
    )
    self.assertIn("  ValueError: no\n", printed)
    # What is done stays as it is, and the rest is tried again.
    (self.folder / "other").write_text("kept")
    outcomes, _ = self.run_tasks(
      self.task("bad"), self.task("next", needs=["bad"]), self.task("other")
    )
    self.assertEqual(set(outcomes.values()), {"done"})
    self.assertEqual((self.folder / "other").read_text(), "kept")

  def test_time_is_up(self):
    outcomes, _ = self.run_tasks(
      self.task("early", "os._exit(0)"), self.task("next", needs=["early"])
    )
    self.assertEqual(outcomes, {"early": "unfinished", "next": "not started"})
    outcomes, _ = self.run_tasks(self.task("late"), deadline=time.monotonic())
    self.assertEqual(outcomes, {"late": "not started"})

  def test_what_leaves_nothing_is_done_when_it_ends(self):
    compiled = processes.Task(
      name="compiled",
      command=lambda minutes: [sys.executable, "-c", ""],
      trains=False,
    )
    outcomes, _ = self.run_tasks(compiled, self.task("a", needs=["compiled"]))
    self.assertEqual(outcomes, {"compiled": "done", "a": "done"})

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, "need tasks.*got 'none'"):
      self.run_tasks(self.task("a", needs=["none"]))
    with self.assertRaisesRegex(ValueError, "different names"):
      self.run_tasks(self.task("a"), self.task("a"))


if __name__ == "__main__":
  absltest.main()
