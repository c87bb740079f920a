# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The timing scripts: that they run and say what they can't; never a time."""

import json

from absl.testing import absltest

from tests.experiments import scripts_test


class BenchTest(scripts_test.ScriptCase):
  def records(self, name):
    lines = (self.folder / name).read_text().splitlines()
    return [json.loads(line) for line in lines]

  def test_inference_of_two_schedules(self):
    done = scripts_test.run(
      "bench_inference",
      "--preset=tiny",
      "--num_layers=2",
      "--contexts=20,30",
      "--schedules=full,FS",
      "--chunk_size=10",
      "--new_tokens=2",
      "--index_key_dtypes=float8_e4m3fn",
      f"--output_dir={self.folder}",
    )
    self.assert_succeeds(done)
    self.assertIn("| prefill | 30 | float8_e4m3fn | FS |", done.stdout)
    self.assertIn("| decode | 20 | float8_e4m3fn | FS |", done.stdout)
    self.assertTrue((self.folder / "inference.png").exists())
    records = self.records("inference.jsonl")
    caches = {
      r["schedule"]: r["bytes"] for r in records if r["metric"] == "cache"
    }
    # 40 tokens: 2 layers of 24 floats, 2 or 1 of 16 bytes and a scale.
    self.assertEqual(caches, {"full": 9280, "FS": 8480})
    self.assertTrue(all(r["device"] for r in records))

  def test_the_fast_path_against_the_reference(self):
    done = scripts_test.run(
      "check_inference",
      "--preset=tiny",
      "--schedules=FSSF",
      "--context=40",
      "--chunk_size=20",
      "--new_tokens=2",
      f"--output_dir={self.folder}",
    )
    self.assert_succeeds(done)
    exact, rounded = self.records("check.jsonl")
    # On a CPU both are plain XLA in float32.
    self.assertEqual(exact["logits_error"], 0)
    self.assertEqual(exact["same_keys"], 1)
    self.assertGreater(rounded["decode_logits_error"], 0)

  def test_a_layer(self):
    done = scripts_test.run(
      "bench_layer",
      "--preset=tiny",
      "--contexts=24",
      "--implementations=xla",
      "--launches=1",
      f"--output_dir={self.folder}",
    )
    self.assert_succeeds(done)
    self.assertLen(self.records("layer.jsonl"), 4)

  def test_what_they_refuse(self):
    for name, args, message in (
      ("bench_kernels", [], "bench_kernels needs a GPU that JAX sees: got"),
      ("profile_layer", [], "profile_layer needs a GPU that JAX sees: got"),
      (
        "bench_inference",
        ["--preset=tiny", "--schedules=1/4"],
        "the paper's pattern of 47 layers: got a model of 4",
      ),
    ):
      with self.subTest(name):
        done = scripts_test.run(name, *args)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn(message, done.stderr)
        self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
  absltest.main()
