# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a result says of its origin."""

import subprocess
import sys
from unittest import mock

import jax
from absl.testing import absltest

from experiments import common, provenance


class ProvenanceTest(absltest.TestCase):
  def test_versions_of_cuda_and_the_driver(self):
    device = mock.Mock(device_kind="NVIDIA H200")
    device.client.platform_version = "cuda 13000"
    printed = mock.Mock(stdout="580.65.06\n")
    with (
      mock.patch.object(jax, "default_backend", return_value="gpu"),
      mock.patch.object(jax, "devices", return_value=[device]),
      mock.patch.object(subprocess, "run", return_value=printed),
    ):
      found = common.environment()
    self.assertEqual(found["device"], "1 x NVIDIA H200")
    self.assertEqual(found["cuda"], "13000")
    self.assertEqual(found["driver"], "580.65.06")

  def test_no_driver_on_a_cpu(self):
    self.assertNotIn("driver", common.environment())

  def test_what_no_program_tells_is_unknown(self):
    missing = FileNotFoundError("git")
    with mock.patch.object(subprocess, "run", side_effect=missing):
      self.assertEqual(common.environment()["commit"], "unknown")

  def test_the_command_as_it_was_typed(self):
    words = ["/usr/bin/python3", "-m", "experiments.train", "--words=a b"]
    with mock.patch.object(sys, "orig_argv", words):
      self.assertEqual(
        provenance.command(), "python -m experiments.train '--words=a b'"
      )


if __name__ == "__main__":
  absltest.main()
