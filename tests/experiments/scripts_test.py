# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

import indexcache_jax as ic

# Scripts share names of flags, so one process can import one of them.
from experiments import plots, training_loop
from indexcache_jax import training
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


# A program of its own: the type hook of the tests takes offence at the empty
# states that orbax builds while it restores.
_KILLED_TRAINING = """
import os, pathlib, signal, sys
from unittest import mock
from experiments import training_loop
from indexcache_jax import training
from tests.experiments import scripts_test

def kill(step, metrics):
  if step == 3:  # Two after the save of steps 0 and 1.
    os.kill(os.getpid(), signal.SIGKILL)

with mock.patch.object(training, "check_finite", kill):
  training_loop.run(
    *scripts_test.small_training(), pathlib.Path(sys.argv[1]), save_every=2
  )
"""

_RESUMED_TRAINING = """
import pathlib, sys
from unittest import mock
import jax, numpy as np
from experiments import training_loop
from indexcache_jax import training
from tests.experiments import scripts_test

folder = pathlib.Path(sys.argv[1])
arguments = scripts_test.small_training()
whole = training_loop.run(*arguments, folder / "whole")

steps = []
def note(step, metrics):
  steps.append(step)

with mock.patch.object(training, "check_finite", note):
  resumed = training_loop.run(*arguments, folder / "killed", save_every=2)
print(steps, int(resumed.step))
jax.tree.map(np.testing.assert_array_equal, resumed, whole)

# Out of time in every step.
reached = []
while not reached or reached[-1] < 6:
  state = training_loop.run(*arguments, folder / "late", deadline=0.0)
  reached.append(int(state.step))
print(reached)
jax.tree.map(np.testing.assert_array_equal, state, whole)
"""

# Prints the losses of a training over the devices that there are.
_TRAINING_LOSSES = """
import dataclasses, json, pathlib, sys
from experiments import training_loop
from tests.experiments import scripts_test

config, train, tokens = scripts_test.small_training()
config = config.replace(num_hidden_layers=1)
train = dataclasses.replace(
  train, batch_size=4, accumulation=2, dense_steps=0, warmup_steps=0
)
folder = pathlib.Path(sys.argv[1])
training_loop.run(config, train, tokens, folder)
lines = (folder / "log.jsonl").read_text().splitlines()
print(json.dumps([json.loads(line)["loss"] for line in lines]))
"""


def small_training():
  """Config, settings and tokens of a run of six steps in three stages."""
  config = toy.config().replace(
    num_hidden_layers=2,
    first_k_dense_replace=2,
    schedule=ic.ReuseSchedule("FS"),
  )
  settings = training.TrainConfig(
    context=24, batch_size=2, dense_steps=2, warmup_steps=2, sparse_steps=2
  )
  return config, settings, np.arange(500, dtype=np.int32) * 7 % 61


class TrainTest(ScriptCase):
  def setUp(self):
    super().setUp()
    self.config, self.train, self.tokens = small_training()

  def run_training(self, folder, **changes):
    arguments = {
      "config": self.config,
      "train": self.train,
      "tokens": self.tokens,
      "output_dir": self.folder / folder,
    } | changes
    return training_loop.run(**arguments)

  def test_a_killed_run_goes_on_bit_for_bit(self):
    killed = run_python("-c", _KILLED_TRAINING, str(self.folder / "killed"))
    self.assertEqual(killed.returncode, -signal.SIGKILL, killed.stderr)
    done = run_python("-c", _RESUMED_TRAINING, str(self.folder))
    self.assert_succeeds(done)
    steps, late = done.stdout.splitlines()
    # From the save, or from the start if that was still being written.
    self.assertIn(steps, ("[2, 3, 4, 5] 6", "[0, 1, 2, 3, 4, 5] 6"))
    self.assertEqual(late, "[1, 2, 3, 4, 5, 6]")
    for name in ("whole", "killed", "late"):
      lines = (self.folder / name / "log.jsonl").read_text().splitlines()
      self.assertEqual(
        [json.loads(line)["step"] for line in lines], list(range(6)), name
      )

  def test_devices_share_a_step(self):
    losses = []
    for num_devices in (1, 2):
      done = run_python(
        "-c",
        _TRAINING_LOSSES,
        str(self.folder / str(num_devices)),
        num_devices=num_devices,
      )
      self.assert_succeeds(done)
      losses.append(json.loads(done.stdout.splitlines()[-1]))
    self.assertLen(losses[0], 2)
    np.testing.assert_allclose(*losses, rtol=1e-5)

  def test_refuses_to_resume_other_settings(self):
    settings = self.folder / "run" / "settings.json"
    training_loop._check_same_run(
      settings.parent, self.config, self.train, self.tokens, None
    )
    before = settings.read_text()
    for changes, message in (
      (
        {"config": self.config.replace(schedule=ic.ReuseSchedule("FF"))},
        "schedule=FS there and FF here",
      ),
      ({"tokens": self.tokens[:-1]}, "text=500 tokens.* and 499 tokens"),
      ({"origin": "base"}, "origin=None there and base here"),
    ):
      with self.assertRaisesRegex(ValueError, f"new: got .*run, .*{message}"):
        self.run_training("run", **changes)
    self.assertEqual(settings.read_text(), before)

  def test_stops_at_the_step_that_is_not_finite(self):
    def spoil(config, train, stage, state, tokens, mesh):
      is_finite = {"norm": {"scale": False}, "lm_head": {"kernel": True}}
      return state, training.Metrics(np.nan, 0.0, 1.0, is_finite)

    with (
      mock.patch.object(training, "train_step", spoil),
      self.assertRaisesRegex(
        FloatingPointError, "at step 0 got loss=nan.*finite: norm/scale."
      ),
    ):
      self.run_training("nan")
    # Nothing of it is saved.
    self.assertEmpty(list((self.folder / "nan" / "state").glob("[0-9]*")))

  def test_smoke_writes_a_checkpoint_that_loads(self):
    done = run(
      "train",
      "--smoke",
      "--schedule=uniform:2",
      "--mixture=text,variables:2",
      f"--output_dir={self.folder}",
    )
    self.assert_succeeds(done)
    config, params = ic.load_checkpoint(
      self.folder / "checkpoint", progress=False
    )
    self.assertEqual(config.schedule.pattern, "FS")
    self.assertTrue(
      all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    )
    self.assertLen(list((self.folder / "tensorboard").iterdir()), 1)

  def test_refuses_bad_flags(self):
    for args, message in (
      (["--mixture=prose"], "`mixture` must give shares .*got 'prose:1'"),
      (["--max_minutes=0"], "--max_minutes must be above 0: got 0"),
      (["--batch_size=3", "--accumulation=2"], "`accumulation` must divide"),
      (["--smoke", f"--text={self.folder}"], "`text` must name files, folders"),
    ):
      self.assert_refuses(
        "train", [*args, f"--output_dir={self.folder}"], message
      )


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


class PlotsTest(ScriptCase):
  def test_writes_whole_pictures(self):
    for num_layers in (2, 61):  # With numbers in the cells and without.
      path = self.folder / "new" / f"{num_layers}.png"
      plots.heatmap(path, np.eye(num_layers), title="t", colour_label="c")
      self.assertTrue(path.read_bytes().startswith(_PNG))
    rows = [
      {"method": method, "share": share, "loss": 1 - share}
      for method in ("greedy", "uniform")
      for share in (0.5, 0.25)
    ]
    plots.losses_by_retention(self.folder / "loss.png", rows, 0.7)
    plots.curves_by_retention(
      self.folder / "curves.png",
      {"uniform": [(1.0, [0.5]), (0.25, [0.3, 0.5])]},
      label="accuracy",
    )
    plots.bars(
      self.folder / "bars.png",
      {"full": [0.4, 0.6], "uniform 1/2": [0.4]},
      label="accuracy",
    )
    for name in ("loss", "curves", "bars"):
      path = self.folder / f"{name}.png"
      self.assertTrue(path.read_bytes().startswith(_PNG), name)
    self.assertEmpty(list(self.folder.rglob("*.tmp")))


if __name__ == "__main__":
  absltest.main()
