# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The timing scripts: that they run and say what they can't; never a time."""

import collections
import json
import os
import subprocess
import sys
from unittest import mock

from absl.testing import absltest

from experiments import kernel_workloads
from tests.experiments import scripts_test

_PROFILED = """
from absl import flags
from unittest import mock
from experiments import profile_layer, random_model
from indexcache_jax import presets, schedule

flags.FLAGS([
  "profile_layer", "--contexts=64,96", "--chunk_size=16",
  "--index_key_dtypes=float32,float8_e4m3fn", "--compile_jobs=2",
])
config = presets.PRESETS["tiny"]().replace(
  num_hidden_layers=1,
  first_k_dense_replace=0,
  schedule=schedule.ReuseSchedule.all_full(1),
)
params = random_model.random_params(config)["layers_0"]
flags.FLAGS["phases"].value = ["decode"]
print({case.tokens for case in profile_layer.all_cases(config)}, "alone")
flags.FLAGS["phases"].value = ["prefill", "decode"]
cases = list(profile_layer.all_cases(config))
print(len(cases), "cases")
cases = [case for case in cases if case.context == 64]

def times(program, *args):
  program(*args)
  return [("top_k", 1.0), ("indexer_scores", 2.0), ("fusion", 4.0)]

with mock.patch.object(profile_layer.kernel_timing, "kernel_times", times):
  kernels = profile_layer.profile_all(cases, params)
rates = profile_layer.Rates({"float32": 1e12, "float8_e4m3fn": 2e12}, 1e12)
found = profile_layer.summarize(cases[0], kernels[0], rates)
print(", ".join(f"{record['kind']} {record['ms']}" for record in found))
"""


# Small calls of the workloads that have a million keys, with times made up.
_WORKLOADS = """
import dataclasses

from absl import flags
from experiments import bench_kernels, kernel_timing
from experiments.kernel_workloads import distillation, sparse_mla, topk

kernel_timing.isolated_ms = lambda function, *args, repeats: 2.0
kernel_timing.sustained_ms = lambda run, *args, launches: (
  kernel_timing.Sustained(4.0, 3.0, 5.0)
)
topk._TOP_K = {"9x4096": (9, 4096, "normal")}
sparse_mla._BACKWARD = ((9, 4096, 2),)
distillation._QUERIES, distillation._HEADS = 9, 2
distillation._NUM_KEYS = (4096,)
distillation._DENSE = ((9, 64, 2),)
flags.FLAGS(["bench_kernels"])
rates = {"isolated": 1.0, "sustained": 2.0}
workloads = (
  *topk.top_k(),
  *sparse_mla.sparse_mla_backward(),
  *distillation.selected_scores(),
  *distillation.dense_attention(),
)
refused = dataclasses.replace(workloads[0], function=lambda x: x @ None)
lowered = list(bench_kernels.lower_all([refused, *workloads]))
assert len(lowered) == 2 * len(workloads), lowered
for workload in workloads:
  isolated, sustained = bench_kernels.bench(
    workload, {"bfloat16": rates, "copy": rates}
  )
  assert isolated["rate"] == isolated["share"] == workload.work / 2e9, isolated
  assert isolated["temp_mib"] > 0 and "min_ms" not in isolated, isolated
  found = [sustained[name] for name in ("ms", "min_ms", "max_ms", "temp_mib")]
  assert found == [4.0, 3.0, 5.0, isolated["temp_mib"]], sustained
  assert sustained["share"] == sustained["rate"] / 2, sustained
  print(workload.op, workload.name)
"""


# A CPU does not say how much memory it has.
_BATCHES = """
from experiments import bench_inference, common

bench_inference.free_bytes = lambda params: 100_000
common.run(bench_inference.main)
"""


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

  def test_as_many_requests_as_fit(self):
    with mock.patch.dict(
      os.environ, {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs")}
    ):
      done = scripts_test.run_python(
        *("-c", _BATCHES, "--preset=tiny", "--schedules=full,FSSS"),
        *("--phases=decode", "--contexts=16", "--chunk_size=8"),
        *("--new_tokens=2", "--batch_contexts=16,64", "--max_batch=4"),
        *("--compile_jobs=2", f"--output_dir={self.folder}"),
      )
    self.assert_succeeds(done)
    requests = {
      (r["schedule"], r["context"]): r["batch"]
      for r in self.records("inference.jsonl")
      if r["metric"] == "decode" and r["batch"] > 1
    }
    # 640 or 448 bytes a token; 24 and 72 tokens a cache.
    self.assertEqual(
      requests,
      {("full", 16): 4, ("full", 64): 2, ("FSSS", 16): 4, ("FSSS", 64): 3},
    )
    self.assertIn("| decode, batch 3 | 64 | bfloat16 | FSSS |", done.stdout)

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
    records = self.records("check.jsonl")
    self.assertEqual(
      [record["mlp"] for record in records], 3 * ["dense"] + 3 * ["experts"]
    )
    # On a CPU the fast path is plain XLA, here in float32.
    for exact in (*records[:2], *records[3:5]):
      self.assertEqual(exact["logits_error"], 0)
      self.assertEqual(exact["same_keys"], 1)
      self.assertEqual(exact["same_keys_as_fast"], 1)
    for rounded in records[2::3]:
      self.assertGreater(rounded["decode_logits_error"], 0)
      self.assertEqual(rounded["same_keys_as_fast"], rounded["same_keys"])
    # Two models.
    self.assertNotEqual(records[2]["logits_error"], records[5]["logits_error"])

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
    records = self.records("layer.jsonl")
    self.assertLen(records, 4)
    for record in records:
      self.assertIn("-m experiments.bench_layer --preset", record["command"])
      self.assertBetween(record["ms"], record["min_ms"], record["max_ms"])

  def test_a_million_keys_of_every_op_beside_fewer(self):
    names = collections.defaultdict(list)
    for workload in kernel_workloads.workloads():
      names[workload.op].append(workload.name)
    # It has no keys.
    del names["expert_mlp"]
    for op, found in names.items():
      self.assertLen(set(found), len(found), op)
      for num_keys in ("x1048576", "x131072"):
        self.assertTrue(any(num_keys in name for name in found), (op, num_keys))

  def test_what_a_workload_records(self):
    done = scripts_test.run_python("-c", _WORKLOADS)
    self.assert_succeeds(done)
    self.assertEqual(
      done.stdout.splitlines(),
      [
        "top_k 9x4096",
        "sparse_mla_backward 9x4096 2 heads",
        "selected_indexer_scores 9x4096 2 heads",
        "selected_indexer_scores_backward 9x4096 2 heads",
        "dense_mla_residuals 9x64 2 heads",
      ],
    )

  def test_kinds_of_kernels_of_a_layer(self):
    """All but the driver's times, which a CPU has not."""
    done = subprocess.run(
      [sys.executable, "-c", _PROFILED],
      capture_output=True,
      text=True,
      check=False,
    )
    self.assert_succeeds(done)
    # Two contexts, two phases; full layers in two key dtypes, and shared ones.
    self.assertIn("12 cases\n", done.stdout)
    self.assertIn("{1} alone\n", done.stdout)
    self.assertIn("projections and rest 4.0, scores 2.0, ", done.stdout)
    self.assertIn("selection 1.0, all 7.0\n", done.stdout)

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
