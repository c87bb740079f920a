# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The log of `compile_kernels`, without a compiler."""

import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest

# A process of its own: the module sets the environment of a compiler.
_LOGIC = """
from absl import app
from tests.gpu import cases, compile_kernels

compile_kernels.disassembly.set_environment = lambda: None
compile_kernels.check = lambda case: (
  "spills" if case.name == "odd" else None, "1 kernel"
)
app.run(compile_kernels.main)
"""


class LogTest(absltest.TestCase):
  def test_the_log_is_what_is_printed(self):
    with tempfile.TemporaryDirectory() as folder:
      log = pathlib.Path(folder) / "new" / "compile.log"
      done = subprocess.run(
        [
          *(sys.executable, "-c", _LOGIC),
          *("--ops=topk,expert_mlp", "--name=odd", f"--log={log}"),
        ],
        stdout=subprocess.PIPE,
        text=True,
      )
      self.assertEqual(log.read_text(), done.stdout)
    self.assertEqual(done.returncode, 1)
    self.assertIn("--ops=topk,expert_mlp --name=odd", done.stdout)
    self.assertRegex(
      done.stdout, r"\njax \S+, jaxlib \S+, sm_90a, commit (\w+\+?)\n"
    )
    self.assertRegex(done.stdout, r"\nFAILED topk odd \S+s spills\n")
    self.assertRegex(done.stdout, r"\npassed topk odd_lengths \S+s 1 kernel\n")
    self.assertEndsWith(done.stdout, "\n1 passed, 1 failed\n")


if __name__ == "__main__":
  absltest.main()
