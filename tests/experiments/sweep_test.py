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
from experiments import search_progress
from tests.indexcache import toy


def sweep(output_dir, *flags):
  """Runs the script as a user does."""
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "experiments.sweep_schedules",
      f"--output_dir={output_dir}",
      *flags,
    ],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )


class SweepTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def test_reports_every_method_at_every_retention(self):
    done = sweep(
      self.folder, "--smoke", "--retention=1/2,1/6", "--random_draws=1"
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    report = json.loads((self.folder / "report.json").read_text())
    self.assertEqual(report["num_layers"], 12)
    self.assertEqual(report["calibration_tokens"], 256)
    self.assertIn("commit", report["environment"])
    rows = {
      (row["method"], row["retention"]): row for row in report["schedules"]
    }
    self.assertLen(rows, 10)
    for row in rows.values():
      self.assertEqual(row["num_full"], row["pattern"].count("F"))
      self.assertAlmostEqual(
        row["loss_delta"], row["loss"] - report["baseline_loss"]
      )
      for removed in ("indexer_compute_removed", "index_key_bytes_removed"):
        self.assertAlmostEqual(row[removed], 1 - row["num_full"] / 12)
    self.assertEqual(rows["uniform", "1/6"]["pattern"], "FSSSSSFSSSSS")
    # 11 + 10 + ... + 2 flips, from one search for both retentions.
    self.assertEqual(rows["greedy", "1/6"]["evaluations"], 65)
    self.assertEqual(rows["greedy", "1/2"]["evaluations"], 51)
    # The engines' rule costs a multiple here, whatever 256 tokens they are.
    self.assertLess(
      rows["greedy", "1/2"]["loss"], rows["uniform_freq", "1/2"]["loss"]
    )
    self.assertLen(report["searches"]["greedy"]["trace"], 10)
    pattern = report["recommendation"]["pattern"]
    for engine in ("SGLang", "vLLM"):
      self.assertIn(pattern, report["recommendation"]["overrides"][engine])
      self.assertIn(pattern, done.stdout)
    self.assertIn(pattern, (self.folder / "report.md").read_text())
    for picture in ("loss_by_retention.png", "overlap.png"):
      self.assertTrue(
        (self.folder / picture).read_bytes().startswith(b"\x89PNG")
      )
    self.assertFalse((self.folder / "search_state.json").exists())

  def test_bad_input_ends_in_its_message(self):
    for flags, message in (
      (["--retention=1/2,3"], "above 0, at most 1: got '3'"),
      (["--retention=x"], "got 'x'"),
      (["--methods=uniform,magic"], "greedy.*: got magic"),
      (["--context=32"], "got 32 for index_topk=32"),
      (["--text=/no/such/*.txt"], "matches no file"),
      (["--checkpoint=/no/such/folder"], "/no/such/folder"),
      (["rest"], "takes flags only"),
    ):
      done = sweep(self.folder, *flags)
      self.assertEqual(done.returncode, 1, flags)
      self.assertRegex(done.stderr, message)
      self.assertNotIn("Traceback", done.stderr)

  def test_a_checkpoint_with_shared_layers_is_refused(self):
    config = toy.config("FSFF")
    ic.save_checkpoint(
      self.folder / "shared",
      config.replace(vocab_size=64),
      toy.params_for(config),
    )
    done = sweep(
      self.folder, f"--checkpoint={self.folder / 'shared'}", "--context=32"
    )
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, "tokenizer.json|all full.*FSFF")


class SearchProgressTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / "search_state.json"

  def search(self, progress, stop_after=None):
    count = 0

    def loss(schedule):
      nonlocal count
      count += 1
      if stop_after is not None and count > stop_after:
        raise KeyboardInterrupt
      return sum(3.0**n for n, c in enumerate(schedule.pattern) if c == "S")

    return ic.greedy_search(
      loss,
      num_layers=5,
      num_shared=3,
      state=progress.state("greedy"),
      on_evaluation=progress.callback("greedy"),
    ), count

  def test_an_interrupted_search_goes_on(self):
    whole, evaluations = self.search(
      search_progress.SearchProgress(self.path, "a")
    )
    self.path.unlink()
    with self.assertRaises(KeyboardInterrupt):
      self.search(search_progress.SearchProgress(self.path, "a"), stop_after=5)
    resumed, rest = self.search(search_progress.SearchProgress(self.path, "a"))
    self.assertEqual(resumed, whole)
    self.assertEqual(rest, evaluations - 5)

  def test_refuses_the_state_of_another_sweep(self):
    self.search(search_progress.SearchProgress(self.path, "a"))
    with self.assertRaisesRegex(ValueError, "is of others. Remove it"):
      search_progress.SearchProgress(self.path, "b")
    self.path.write_text(self.path.read_text()[:-20])
    with self.assertRaisesRegex(ValueError, "must be whole"):
      search_progress.SearchProgress(self.path, "a")

  def test_remove_deletes_the_file(self):
    progress = search_progress.SearchProgress(self.path, "a")
    self.search(progress)
    self.assertTrue(self.path.exists())
    progress.remove()
    self.assertFalse(self.path.exists())

  def test_fingerprint_tells_parameters_and_text_apart(self):
    tokens = np.asarray(toy.random_tokens())[None]
    config = toy.config()

    def fingerprint(params, tokens):
      return search_progress.fingerprint(
        config, tokens, ic.LayerwiseLoss(config, params, tokens)
      )

    params = toy.full_params()
    first = fingerprint(params, tokens)
    self.assertEqual(fingerprint(params, tokens), first)
    self.assertNotEqual(fingerprint(params, tokens[..., ::-1]), first)
    other = params | {"norm": {"scale": params["norm"]["scale"] * 1.5}}
    self.assertNotEqual(fingerprint(other, tokens), first)


if __name__ == "__main__":
  absltest.main()
