# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest

from experiments import device_trace
from tests.experiments import scripts_test

_EVENTS = [
  device_trace.Event(100, 50, "fusion_7"),
  # On another stream: half of it beside the first.
  device_trace.Event(125, 50, "MemcpyD2D"),
  device_trace.Event(130, 10, "fusion"),
  device_trace.Event(200, 20, "fusion.12"),
]

# The trace is made up; the programs run.
_TRACED = """
import sys
from unittest import mock
from experiments import common, device_trace, kernel_timing, trace_inference

kernel_timing.require_gpu = device_trace.require_flag = lambda *_: None
event = device_trace.Event
events = [event(0, 8e6, "a_1"), event(9e6, 8e6, "a_2")]
device_trace.read = lambda folder: events
sys.argv = [
  "trace_inference", "--preset=tiny", "--num_layers=3", "--context=64",
  "--capacity=512", "--chunk_size=32",
  "--schedules=FSS",
  f"--output_dir={sys.argv[1]}", *sys.argv[2:],
]
common.run(trace_inference.main)
"""


class DeviceTraceTest(absltest.TestCase):
  def test_what_overlaps_is_busy_once(self):
    self.assertEqual(device_trace.busy_ns(_EVENTS), 75 + 20)
    self.assertEqual(device_trace.busy_ns(reversed(_EVENTS)), 75 + 20)
    self.assertEqual(device_trace.busy_ns([]), 0)

  def test_sums_by_name_without_its_number(self):
    self.assertEqual(
      device_trace.totals(_EVENTS),
      [("fusion", 3, 80), ("MemcpyD2D", 1, 50)],
    )

  def test_refuses_a_folder_without_a_trace_of_a_gpu(self):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    with self.assertRaisesRegex(ValueError, "`folder` holds no trace"):
      device_trace.read(folder)
    with jax.profiler.trace(str(folder)):
      jax.block_until_ready(jnp.ones(3) + 1)
    with self.assertRaisesRegex(ValueError, "no event of a GPU's stream"):
      device_trace.read(folder)

  def test_refuses_flags_without_cuda_graphs(self):
    for flags, refused in (
      ("", True),
      (f"{device_trace.XLA_FLAG}x", True),
      (f"--other=1 {device_trace.XLA_FLAG}", False),
    ):
      with mock.patch.dict(os.environ, {"XLA_FLAGS": flags}):
        if refused:
          with self.assertRaisesRegex(ValueError, "in XLA_FLAGS"):
            device_trace.require_flag()
        else:
          device_trace.require_flag()


class TraceInferenceTest(scripts_test.ScriptCase):
  def test_a_record_for_each_program(self):
    done = scripts_test.run_python("-c", _TRACED, str(self.folder))
    self.assert_succeeds(done)
    lines = (self.folder / "trace.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    self.assertEqual(
      [(r["phase"], r["schedule"], r["num_full"]) for r in records],
      [("decode", "FSS", 1), ("prefill", "FSS", 1)],
    )
    for record in records:
      count = {"decode": 8, "prefill": 2}[record["phase"]]
      self.assertEqual(record["busy_ms"], 16 / count)
      self.assertEqual(record["kernels"], 2 / count)
      self.assertEqual(
        record["longest"], [{"name": "a", "count": 2 / count, "ms": 16 / count}]
      )
      self.assertGreater(record["wall_ms"], 0)

  def test_what_it_refuses(self):
    done = scripts_test.run("trace_inference")
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertIn("needs a GPU that JAX sees: got", done.stderr)
    for args, message in (
      (("--capacity=512", "--context=400"), "hold the context and the tokens"),
      (("--context=16", "--capacity=512"), "must be at most `--context`, 16"),
    ):
      done = scripts_test.run_python("-c", _TRACED, str(self.folder), *args)
      self.assertEqual(done.returncode, 1, done.stderr)
      self.assertIn(message, done.stderr)


if __name__ == "__main__":
  absltest.main()
