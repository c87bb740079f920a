# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import tempfile
import time
from unittest import mock

from absl.testing import absltest

from experiments import gpu_clock

_NVIDIA_SMI = """#!/bin/sh
echo "$@" > "$ARGUMENTS"
echo "345, 70.5"
while true; do sleep 0.05; echo "1980, 600"; echo "[N/A], [N/A]"; done
"""


class ClockLogTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.arguments = self.folder / "arguments"

  def on_a_gpu(self, **environment):
    script = self.folder / "nvidia-smi"
    script.write_text(_NVIDIA_SMI)
    script.chmod(0o755)
    self.enter_context(
      mock.patch.dict(
        os.environ,
        {
          "PATH": f"{self.folder}:{os.environ['PATH']}",
          "ARGUMENTS": str(self.arguments),
          **environment,
        },
      )
    )

  def wait_for(self, condition):
    deadline = time.monotonic() + 30
    while not condition():
      self.assertLess(time.monotonic(), deadline)
      time.sleep(0.01)

  def test_means_since_a_time(self):
    self.on_a_gpu(CUDA_VISIBLE_DEVICES="3,4")
    with gpu_clock.ClockLog() as clock:
      self.wait_for(lambda: clock.since(0))
      # The first line, of an idle card, lies before.
      begin = time.perf_counter()
      self.wait_for(lambda: clock.since(begin))
      self.assertEqual(clock.since(begin), {"sm_mhz": 1980, "watts": 600})
      self.assertEqual(clock.since(time.perf_counter() + 60), {})
      process = clock._process
    self.assertIsNotNone(process.returncode)
    self.assertIn("--id=3", self.arguments.read_text())

  def test_nothing_without_the_tool(self):
    with (
      mock.patch.object(gpu_clock.shutil, "which", return_value=None),
      gpu_clock.ClockLog() as clock,
    ):
      self.assertEqual(clock.since(0), {})


if __name__ == "__main__":
  absltest.main()
