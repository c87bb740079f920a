# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest

from experiments import inference_report


def profiled(phase, context, layer, ms, tokens=10):
  return {
    "phase": phase,
    "context": context,
    "layer": layer,
    "index_keys": "bfloat16",
    "tokens": tokens,
    "kind": "all",
    "ms": ms,
  }


class AmdahlLimitTest(absltest.TestCase):
  def test_a_token_loses_the_indexers_of_the_shared_layers(self):
    profile = [
      profiled("decode", 100, "full", 3.0),
      profiled("decode", 100, "shared", 1.0),
    ]
    # 4 layers in 20 ms; 3 indexers of 2 ms go away.
    limit = inference_report.amdahl_limit(
      profile, "decode", "bfloat16", 100, (20.0, 4), 1
    )
    self.assertAlmostEqual(limit, 20 / 14)

  def test_a_prefill_adds_up_its_chunks(self):
    profile = [
      profiled("prefill", context, layer, ms)
      for context, full in ((10, 2.0), (40, 5.0))
      for layer, ms in (("full", full), ("shared", 1.0))
    ]
    # An indexer takes 1, 2, 3 and 4 ms in the chunks that end at 10 to 40.
    limit = inference_report.amdahl_limit(
      profile, "prefill", "bfloat16", 40, (0.1, 4), 2
    )
    self.assertAlmostEqual(limit, 0.1 / (0.1 - 2 * 0.01))

  def test_none_where_nothing_was_profiled(self):
    limit = inference_report.amdahl_limit(
      [], "decode", "bfloat16", 100, (20.0, 4), 1
    )
    self.assertIsNone(limit)


class TableTest(absltest.TestCase):
  def test_ratios_are_to_the_all_full_schedule(self):
    common = {"index_keys": "bfloat16", "context": 7, "metric": "decode"}
    records = [
      {**common, "schedule": "full", "num_full": 4, "batch": 1}
      | {"ms_per_token": 20.0},
      {**common, "schedule": "1/4", "num_full": 1, "batch": 1}
      | {"ms_per_token": 16.0},
      {**common, "schedule": "1/4", "num_full": 1, "batch": 8}
      | {"ms_per_token": 40.0, "tokens_per_second": 200.0},
      {**common, "schedule": "1/2", "num_full": 2, "batch": 1}
      | {"ms_per_token": 18.0},
      {**common, "schedule": "full", "num_full": 4, "batch": 6}
      | {"ms_per_token": 60.0, "tokens_per_second": 100.0},
      # As many full layers as 1/4.
      {**common, "schedule": "FSSS", "num_full": 1, "batch": 8}
      | {"ms_per_token": 32.0, "tokens_per_second": 250.0},
    ]
    lines = inference_report.table(records, []).splitlines()
    self.assertEqual(
      lines[2:],
      [
        "| decode | 7 | bfloat16 | full | 20 ms | 1x |  |",
        "| decode | 7 | bfloat16 | 1/2 | 18 ms | 1.11x |  |",
        "| decode | 7 | bfloat16 | 1/4 | 16 ms | 1.25x |  |",
        "| decode, batch 6 | 7 | bfloat16 | full | 100 tokens/s | 1x |  |",
        "| decode, batch 8 | 7 | bfloat16 | 1/4 | 200 tokens/s | 2x |  |",
        "| decode, batch 8 | 7 | bfloat16 | FSSS | 250 tokens/s | 2.5x |  |",
      ],
    )


class TablesTest(absltest.TestCase):
  def test_makes_the_tables_of_a_folder_again(self):
    temporary = tempfile.TemporaryDirectory()
    self.addCleanup(temporary.cleanup)
    folder = pathlib.Path(temporary.name)
    record = {
      "metric": "prefill",
      "index_keys": "bfloat16",
      "context": 7,
      "schedule": "full",
      "num_full": 4,
      "seconds": 2.0,
    }
    (folder / "inference.jsonl").write_text(json.dumps(record) + "\n")
    command = [sys.executable, "-m", "experiments.inference_tables"]
    done = subprocess.run(
      [*command, f"--folder={folder}"], capture_output=True, text=True
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    line = "| prefill | 7 | bfloat16 | full | 2 s | 1x |  |"
    self.assertIn(line, (folder / "inference.md").read_text())
    self.assertTrue((folder / "inference.png").exists())
    done = subprocess.run(
      [*command, f"--folder={folder / 'none'}"], capture_output=True, text=True
    )
    self.assertIn("--folder must hold inference.jsonl", done.stderr)


class IndexerTableTest(absltest.TestCase):
  def test_fits_a_line(self):
    records = [
      {
        "metric": "decode",
        "context": 7,
        "index_keys": "bfloat16",
        "schedule": str(num_full),
        "num_full": num_full,
        "batch": 1,
        "ms_per_token": 6.0 + 0.5 * num_full,
      }
      for num_full in (8, 4, 2)
    ]
    (line,) = inference_report.indexer_table(records).splitlines()[2:]
    self.assertEqual(
      line, "| decode | 7 | bfloat16 | 0.5 ms | 6 ms | 0.0% | 1.67x |"
    )

  def test_two_schedules_are_too_few(self):
    records = [
      {
        "metric": "decode",
        "context": 7,
        "index_keys": "bfloat16",
        "schedule": str(num_full),
        "num_full": num_full,
        "ms_per_token": 6.0,
      }
      for num_full in (8, 4)
    ]
    self.assertLen(inference_report.indexer_table(records).splitlines(), 2)


if __name__ == "__main__":
  absltest.main()
