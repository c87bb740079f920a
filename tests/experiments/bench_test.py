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
      "--contexts=20,30",
      "--schedules=full,FSSS",
      "--chunk_size=10",
      "--new_tokens=2",
      f"--output_dir={self.folder}",
    )
    self.assert_succeeds(done)
    self.assertIn("| prefill | 30 | FSSS |", done.stdout)
    self.assertIn("| decode | 20 | FSSS |", done.stdout)
    records = self.records("inference.jsonl")
    caches = {
      r["schedule"]: r["bytes"] for r in records if r["metric"] == "cache"
    }
    # 40 tokens: 4 layers of 24 floats, 4 or 1 of 16.
    self.assertEqual(caches, {"full": 25600, "FSSS": 17920})
    self.assertTrue(all(r["device"] for r in records))

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
