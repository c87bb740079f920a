# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import signal
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

import indexcache_jax as ic
from experiments import training_loop
from indexcache_jax import training
from tests.experiments import scripts_test
from tests.indexcache import toy

# Programs of their own: the type hook of the tests takes offence at the empty
# states that orbax builds while it restores.
_KILLED_TRAINING = """
import os, pathlib, signal, sys
from unittest import mock
from experiments import training_loop
from indexcache_jax import training
from tests.experiments import train_test

def kill(step, metrics):
  if step == 3:  # Two after the save of steps 0 and 1.
    os.kill(os.getpid(), signal.SIGKILL)

with mock.patch.object(training, "check_finite", kill):
  training_loop.run(
    *train_test.small_training(), pathlib.Path(sys.argv[1]), save_every=2
  )
"""

_RESUMED_TRAINING = """
import pathlib, sys
from unittest import mock
import jax, numpy as np
from experiments import training_loop
from indexcache_jax import training
from tests.experiments import train_test

folder = pathlib.Path(sys.argv[1])
arguments = train_test.small_training()
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
from tests.experiments import train_test

config, train, tokens = train_test.small_training()
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


class TrainTest(scripts_test.ScriptCase):
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
    killed = scripts_test.run_python(
      "-c", _KILLED_TRAINING, str(self.folder / "killed")
    )
    self.assertEqual(killed.returncode, -signal.SIGKILL, killed.stderr)
    done = scripts_test.run_python("-c", _RESUMED_TRAINING, str(self.folder))
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
      done = scripts_test.run_python(
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
    done = scripts_test.run(
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


if __name__ == "__main__":
  absltest.main()
