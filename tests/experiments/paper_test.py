# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import statistics

import numpy as np
from absl.testing import absltest

from experiments import paper_log, paper_recipe, paper_report
from tests.experiments import scripts_test

_OTHER = "searched 1/2, multi-layer"


class ScriptsTest(scripts_test.ScriptCase):
  def test_smoke_trains_and_makes_every_table(self):
    runs, tables = self.folder / "seed3", self.folder / "tables"
    done = scripts_test.run(
      "paper_all",
      "--smoke",
      "--seeds=3",
      "--variant=full",
      f"--variant={_OTHER}",
      "--processes_per_device=2",
      "--compile_jobs=1",
      f"--output_dir={self.folder}",
    )
    self.assert_succeeds(done)
    self.assertIn("All done after", done.stdout)
    found = json.loads((runs / "search.json").read_text())
    self.assertEqual(found["searches"]["text"]["patterns"]["1/2"], "FS")
    self.assertIn("--part=search --seed=3", found["command"])
    for name in paper_report.TABLES:
      table = json.loads((tables / f"{name}.json").read_text())
      self.assertEqual(table["seeds"], [3], name)
      self.assertIn(
        "experiments.paper_tables --dtype=float32 --smoke", table["commands"][0]
      )
      self.assertIn("# Table", (tables / f"{name}.md").read_text())
    self.assertLen(list(tables.glob("*.png")), 6)
    log = (tables / "training_log.csv").read_text().splitlines()
    # A line a stage: dense and sparse of the base model, sparse of variants.
    self.assertEqual(
      [line.split(",")[:5] for line in log[1:]],
      [
        ["3", "base", "dense", "0", "1"],
        ["3", "base", "sparse", "1", "1"],
        ["3", "full", "sparse", "0", "1"],
        ["3", paper_recipe.folder_name(_OTHER), "sparse", "0", "1"],
      ],
    )
    self.assertIn("Seeds: 3.", (tables / "claims.md").read_text())
    base, variant = (
      (self.folder / "logs" / f"seed3_{part}.log").read_text()
      for part in ("base", "full")
    )
    self.assertIn("Checkpoint: ", base)
    self.assertIn("full: FF\n", variant)
    self.assertTrue(list((self.folder / "programs").glob("jit_train_step-*")))
    rows = json.loads((tables / "training_aware.json").read_text())["rows"]
    self.assertEqual(list(rows), ["full", _OTHER])
    self.assertIn("depths", rows["full"])
    # The measurements alone make them again.
    for folder in runs.iterdir():
      if folder.is_dir():
        folder.rename(self.folder / f"gone_{folder.name}")
    again = self.folder / "again"
    done = scripts_test.run(
      "paper_tables", "--smoke", f"--runs={runs}", f"--output_dir={again}"
    )
    self.assert_succeeds(done)
    for path in tables.glob("*.json"):
      self.assertEqual(path.read_text(), (again / path.name).read_text())

  def test_refuses(self):
    self.assert_refuses(
      "paper_tables",
      ["--smoke", f"--runs={self.folder}"],
      "--runs must name folders that hold a base model .*paper_runs",
    )
    self.assert_refuses(
      "paper_runs",
      ["--smoke", "--part=full", f"--output_dir={self.folder}"],
      "--part must name `base` until the base model is trained",
    )
    self.assert_refuses(
      "paper_all",
      ["--smoke", "--seeds=one", f"--output_dir={self.folder}"],
      "--seeds must be whole numbers from 0, one or more: got 'one'",
    )


def record(seed, losses, exact):
  """A measurement of table 2 or 3, the same accuracy everywhere in a row."""
  return {
    "seed": seed,
    "command": f"command {seed}",
    "environment": {"device": "x"},
    "rows": [
      {
        "schedule": name,
        "pattern": "FFFF" if name == "full" else "FSSF",
        "loss": loss,
        "accuracy": [
          {
            "task": task,
            "length": length,
            "count": 2,
            "exact": share,
            "by_depth": [[0.0, share], [1.0, share]],
          }
          for task in ("needle", "copying")
          for length in (512, 640)
        ],
      }
      for (name, loss), share in zip(losses.items(), exact, strict=True)
    ],
  }


class ReportTest(scripts_test.ScriptCase):
  def test_means_and_spreads_are_of_pairs_within_a_seed(self):
    records = [
      record(0, {"full": 1.0, _OTHER: 1.5}, (1.0, 0.5)),
      record(1, {"full": 2.0, _OTHER: 2.7}, (0.8, 0.5)),
    ]
    words = paper_report.write("training_aware", records, self.folder)
    rows = json.loads((self.folder / "training_aware.json").read_text())["rows"]
    other = rows[_OTHER]
    np.testing.assert_allclose(other["loss"]["mean"], 2.1)
    np.testing.assert_allclose(other["loss_change"]["values"], [0.5, 0.7])
    np.testing.assert_allclose(
      other["loss_change"]["spread"], statistics.stdev([0.5, 0.7])
    )
    np.testing.assert_allclose(rows["full"]["accuracy"]["mean"], 0.9)
    self.assertIn("| full | 4 | 1.5000 ± 0.7071 | 0.0000 ± 0.0000 |", words)
    self.assertIn(
      f"| {_OTHER} | 2 | 2.1000 ± 0.8485 | 0.6000 ± 0.1414 |", words
    )
    self.assertIn("2 seeds", words)
    self.assertIn("seed 1: `command 1`; device x", words)

  def test_one_seed_has_no_spread(self):
    words = paper_report.write(
      "training_aware", [record(0, {"full": 1.0}, (1.0,))], self.folder
    )
    self.assertIn("| full | 4 | 1.0000 | 0.0000 | 1.00 |", words)

  def test_refuses(self):
    one = record(0, {"full": 1.0}, (1.0,))
    other = record(1, {"full": 1.0, _OTHER: 1.5}, (1.0, 0.5))
    for records, message in (
      ([one, one], r"distinct seeds: got seeds \[0, 0\]"),
      ([one, other], "the same rows.*Finish `paper_runs` of every seed"),
      ([record(0, {_OTHER: 1.0}, (1.0,))], "the one of all full among them"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        paper_report.write("training_aware", records, self.folder)


class LogTest(scripts_test.ScriptCase):
  def write(self, seed, losses, stage="dense"):
    part = self.folder / f"seed{seed}" / "base"
    part.mkdir(parents=True)
    (part / "settings.json").write_text(json.dumps({"seed": str(seed)}))
    record = {"stage": stage, "index_kl": 0.0, "grad_norm": 1.0, "seconds": 2.0}
    (part / "log.jsonl").write_text(
      "".join(
        json.dumps({**record, "step": step, "loss": loss}) + "\n"
        for step, loss in enumerate(losses)
      )
    )
    return part.parent

  def test_means_of_twenty_steps(self):
    path = self.folder / "log.csv"
    paper_log.write([self.write(0, 20 * [1.0] + 4 * [2.0])], path)
    self.assertEqual(
      path.read_text().splitlines()[1:],
      ["0,base,dense,0,20,1,0,1,2", "0,base,dense,20,4,2,0,1,2"],
    )
    # A folder whose logs are gone keeps its lines; others come beside them.
    (self.folder / "seed0" / "base" / "log.jsonl").unlink()
    folders = [self.write(1, [3.0]), self.folder / "seed0"]
    paper_log.write(folders, path)
    self.assertEqual(
      path.read_text().splitlines()[2:],
      ["0,base,dense,20,4,2,0,1,2", "1,base,dense,0,1,3,0,1,2"],
    )


class RecipeTest(absltest.TestCase):
  def test_names(self):
    names = [paper_recipe.folder_name(name) for name in paper_recipe.VARIANTS]
    self.assertLen(set(names), len(paper_recipe.VARIANTS))
    for name in names:
      self.assertRegex(name, "^[a-z0-9_]+$")

  def test_full_size(self):
    recipe = paper_recipe.recipe(1, dtype=np.dtype("float32"))
    self.assertLessEqual(recipe.config.index_topk, recipe.context // 16)
    self.assertEqual(max(recipe.lengths), recipe.context)
    half = paper_recipe.recipe(1, dtype=np.dtype("float32"), scale=0.5)
    self.assertEqual(2 * half.base.num_steps, recipe.base.num_steps)
    with self.assertRaisesRegex(ValueError, "`scale` .*above 0: got 0"):
      paper_recipe.recipe(1, dtype=np.dtype("float32"), scale=0)
    self.assertFalse(
      recipe.variant_training("uniform 1/4, own layer").multi_layer
    )


if __name__ == "__main__":
  absltest.main()
