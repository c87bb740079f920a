# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from absl.testing import absltest

import indexcache_jax as ic
from tests.indexcache import checkpoints_toy, toy

_PNG = b"\x89PNG"
# Compilation is most of what these tests take, and speed is not their matter.
_FAST_COMPILATION = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def command(name, *args):
  return [sys.executable, "-m", f"experiments.{name}", *map(str, args)]


def run(name, *args, num_devices=1):
  """Runs a script as a user does."""
  return run_python(*command(name, *args)[1:], num_devices=num_devices)


def run_python(*args, num_devices=1):
  devices = f"--xla_force_host_platform_device_count={num_devices}"
  return subprocess.run(
    [sys.executable, *args],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"{_FAST_COMPILATION} {devices}",
    },
  )


class ScriptCase(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def assert_succeeds(self, done):
    self.assertEqual(done.returncode, 0, done.stderr)

  def assert_refuses(self, name, args, message):
    """Bad input ends in its message, without a traceback."""
    done = run(name, *args)
    self.assertEqual(done.returncode, 1, args)
    self.assertRegex(done.stderr.replace("\n", " "), message)
    self.assertNotIn("Traceback", done.stderr)

  def report(self, name):
    # Nothing temporary is left beside it.
    self.assertEmpty(list(self.folder.glob(".*")))
    return json.loads((self.folder / name).read_text())


class MeasureOverlapTest(ScriptCase):
  def test_smoke(self):
    done = run(
      "measure_overlap",
      "--smoke",
      "--positions=40,63",
      f"--output_dir={self.folder}",
    )
    self.assert_succeeds(done)
    report = self.report("overlap.json")
    for key, expected in (
      ("tokens", 128),
      ("context", 64),
      ("index_topk", 32),
      ("positions", [40, 63]),
      ("checkpoint", "the embedded small model"),
    ):
      self.assertEqual(report[key], expected, key)
    self.assertIn("measure_overlap --smoke", report["command"])
    shares = {name: len(x) for name, x in report["shared_rows"].items()}
    self.assertEqual(shares, {"2": 12, "3": 12, "4": 12})
    self.assertIn("2 neighbouring queries: distinct keys 0.", done.stdout)
    self.assertEqual(report["environment"]["platform"], "cpu")
    for name in ("overlap", "recall"):
      by_position = np.array(report[name])
      self.assertEqual(by_position.shape, (2, 12, 12))
      matrix, summary = by_position.mean(axis=0), report["summaries"][name]
      own, adjacent = np.diagonal(matrix), np.diagonal(matrix, -1)
      np.testing.assert_allclose(summary["own"], own.mean(), rtol=1e-5)
      np.testing.assert_allclose(
        [
          summary["mean_by_lag"][0],
          summary["adjacent_min"],
          summary["adjacent_max"],
          summary["mean_by_lag"][10],
        ],
        [adjacent.mean(), adjacent.min(), adjacent.max(), matrix[11, 0]],
        rtol=1e-5,
      )
      layer, source = summary["min_pair"]
      self.assertGreater(layer, source)
      lowest = matrix[np.tril_indices(12, -1)].min()
      np.testing.assert_allclose(
        [summary["min"], matrix[layer, source]], lowest, rtol=1e-5
      )
      self.assertTrue(
        (self.folder / f"{name}.png").read_bytes().startswith(_PNG)
      )
    # An indexer finds more of its own layer's mass than others' do.
    recall = report["summaries"]["recall"]
    self.assertGreater(recall["own"], recall["mean_by_lag"][0])
    self.assertIn("position 63: recall of adjacent layers", done.stdout)

  def test_refuses_uninformative_positions(self):
    self.assert_refuses(
      "measure_overlap",
      ["--smoke", "--positions=3"],
      r"more than index_topk=32 keys.*got \[3\] of 64 tokens",
    )
    self.assert_refuses(
      "measure_overlap", ["--positions=3,x"], "whole numbers from 0"
    )


class EvaluateTest(ScriptCase):
  def test_smoke_compares_with_all_full(self):
    done = run(
      "evaluate",
      "--smoke",
      "--schedule=uniform:4",
      f"--output_dir={self.folder}",
    )
    self.assert_succeeds(done)
    report = self.report("evaluation.json")
    full, shared = report["evaluations"]
    self.assertEqual(full["pattern"], "F" * 12)
    self.assertEqual(shared["pattern"], "FSSS" * 3)
    self.assertEqual(report["loss_change"], shared["loss"] - full["loss"])
    # Sharing costs this model much, above all where facts lie far back.
    self.assertBetween(full["loss"], 0.3, 1.5)
    self.assertGreater(report["loss_change"], 0.02)
    [asked] = full["tasks"]
    self.assertEqual(
      asked,
      {
        "task": "needle",
        "length": 128,
        "count": 2,
        "exact": 1.0,
        "by_depth": [[0.0, 1.0], [1.0, 1.0]],
      },
    )
    self.assertLess(shared["tasks"][0]["exact"], 1.0)
    self.assertEqual([report["tokens"], report["num_facts"]], [512, 2])
    self.assertIn("needle, 128 tokens", done.stdout)
    for pattern in (full["pattern"], shared["pattern"]):
      self.assertIn(pattern, done.stdout)

  def test_a_checkpoint_with_shared_layers_has_its_own_schedule_alone(self):
    checkpoint = self.folder / "checkpoint"
    config = toy.config("FSFS", vocab_size=256)
    checkpoints_toy.save(checkpoint, config=config)
    flags_of_toy = (f"--checkpoint={checkpoint}", "--smoke", "--context=64")
    done = run("evaluate", *flags_of_toy, f"--output_dir={self.folder}")
    self.assert_succeeds(done)
    report = self.report("evaluation.json")
    self.assertIsNone(report["loss_change"])
    [own] = report["evaluations"]
    self.assertEqual(own["pattern"], "FSFS")
    self.assertTrue(np.isfinite(own["loss"]))
    self.assert_refuses(
      "evaluate",
      (*flags_of_toy, "--schedule=full"),
      "CheckpointError: .*indexer",
    )

  def test_refuses_bad_flags(self):
    for args, message in (
      (["--schedule=foo"], "`schedule` must be a pattern .*got 'foo'"),
      (["--schedule=FSSF"], "4 letters .'FSSF'. for num_layers=12"),
      (["--smoke", "--context=40"], "'needle' must hold .*51 tokens.*got 36"),
      (["--smoke", "--tasks=foo"], "`tasks` must name any of needle.*'foo'"),
      (["rest"], "flags only"),
    ):
      self.assert_refuses("evaluate", args, message)


# The signal of Ctrl-C, at the call of that number. Sent from outside it could
# hit a finalizer, such as that of the progress bar, where Python drops it.
# A shell's background jobs ignore it, and so would Python.
_INTERRUPTED_GENERATION = """
import itertools, signal, sys
import indexcache_jax as ic
from experiments import common, generate

signal.signal(signal.SIGINT, signal.default_int_handler)
calls, last, real = itertools.count(1), int(sys.argv.pop()), ic.generate
def interrupted(*args, **kwargs):
  if next(calls) == last:
    signal.raise_signal(signal.SIGINT)
  return real(*args, **kwargs)

ic.generate = interrupted
sys.argv = ["generate", "--smoke", "--prompt=import os\\nimport "]
common.run(generate.main)
"""


class GenerateTest(ScriptCase):
  def test_the_text_is_the_same_on_one_device_and_on_four(self):
    checkpoint = self.folder / "checkpoint"
    checkpoints_toy.save(checkpoint, config=toy.config(vocab_size=256))
    outputs = []
    for num_devices in (1, 4):
      done = run(
        "generate",
        "--smoke",
        f"--checkpoint={checkpoint}",
        "--schedule=FFSS",
        num_devices=num_devices,
      )
      self.assert_succeeds(done)
      outputs.append(done.stdout.split("tokens/s")[0].rsplit("\n", 1)[0])
    self.assertEqual(*outputs)

  def test_smoke(self):
    done = run(
      "generate",
      "--smoke",
      "--prompt=import os\nimport ",
      "--schedule=FFFFFFFFFFSS",
      "--chunk_size=10",
    )
    self.assert_succeeds(done)
    self.assertStartsWith(done.stdout, "import os\nimport os\n")
    self.assertRegex(done.stdout, r"tokens/s: 8 after 17 in")
    # 17 + 8 tokens: 12 layers of 80 floats, 12 or 10 of 32.
    without, reuse = (line.split() for line in done.stdout.splitlines()[-2:])
    self.assertEqual(without[-3:], ["96,000", "38,400", "134,400"])
    self.assertEqual(reuse[-3:], ["96,000", "32,000", "128,000"])

  def test_reads_the_prompt_from_a_file(self):
    path = self.folder / "prompt.txt"
    path.write_text("class é")
    done = run("generate", "--smoke", f"--prompt_file={path}")
    self.assert_succeeds(done)
    self.assertStartsWith(done.stdout, "class é")

  def test_ctrl_c_says_what_is_unfinished(self):
    for call, message, has_text in (
      (1, "no text was generated", False),
      (2, "the text is whole, its speed was not measured", True),
    ):
      done = run_python("-c", _INTERRUPTED_GENERATION, str(call))
      self.assertEqual(done.returncode, 130, done.stderr)
      self.assertIn(f"Interrupted: {message}.", done.stderr)
      self.assertNotIn("Traceback", done.stderr)
      self.assertEqual("import os\nimport os" in done.stdout, has_text)
      self.assertNotIn("tokens/s", done.stdout)

  def test_refuses_bad_flags(self):
    for args, message in (
      (["--schedule=freq:0"], "index_topk_freq. must be at least 1: got 0"),
      (["--prompt="], "must hold text: got ''"),
      (["--prompt=a", "--prompt_file=b"], "prompt_file"),
      (["--prompt_file=/no/such"], "file of text in UTF-8: got '/no/such'"),
      (["--prompt=aa", "--max_new_tokens=1023"], r"got 2 \+ 1023 .* 1024"),
      (["--temperature=-1"], "temperature"),
    ):
      self.assert_refuses("generate", args, message)


class ScheduleFlagTest(absltest.TestCase):
  def test_every_notation(self):
    for words, pattern in (
      ("FSSF", "FSSF"),
      ("full", "FFFF"),
      ("uniform:2", "FSFS"),
      ("freq:2", "FFSF"),
      ("freq:2:1", "FSFS"),
    ):
      schedule = ic.ReuseSchedule.parse(words, 4)
      self.assertEqual(schedule.pattern, pattern, words)

  def test_refuses_the_rest(self):
    for words, message in (
      ("", "`schedule` must be a pattern such as .*: got ''"),
      ("fssf", "got 'fssf'"),
      ("uniform:2:3", "got 'uniform:2:3'"),
      ("freq:", "got 'freq:'"),
      ("freq:-1", "got 'freq:-1'"),
      ("freq:4:0", "`offset` .*got 0"),
      ("uniform:0", "`every` must be an integer above 0: got 0"),
      ("FSXF", "got 'X' at layer 2 of 'FSXF'"),
      ("FFF", "3 letters .'FFF'. for num_layers=4"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        ic.ReuseSchedule.parse(words, 4)


if __name__ == "__main__":
  absltest.main()
