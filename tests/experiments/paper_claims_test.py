# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import tempfile

from absl.testing import absltest

from experiments import paper_claims


def rows(**accuracies):
  """A table of these rows; one task is not learned."""
  return {
    "seeds": [0, 1],
    "rows": {
      name: {
        "tasks": {
          "needle": {"512": {"values": values}, "640": {"values": values}},
          "variables": {"512": {"values": NOISE.get(name, [0.0, 0.0])}},
        }
      }
      for name, values in accuracies.items()
    },
  }


NOISE = {"searched 1/8": [0.0, 0.9]}
OVERLAP = {"seeds": [0, 1], "adjacent": {"values": [0.6, 0.4]}}
# Two of three cells: all means are two thirds of these.
FREE = {
  "full": [0.9, 0.8],
  "uniform 1/4": [0.5, 0.4],
  "searched 1/4": [0.9, 0.79],
  "searched 1/8": [0.85, 0.6],
  "by overlap 1/4": [0.9, 0.79],
}
AWARE = {
  "full": [0.9, 0.8],
  "uniform 1/4, multi-layer": [0.88, 0.7],
  "uniform 1/4, own layer": [0.6, 0.5],
}


class FindingsTest(absltest.TestCase):
  def find(self):
    return paper_claims.findings(OVERLAP, rows(**FREE), rows(**AWARE))

  def test_verdicts(self):
    verdicts = [finding.verdict for finding in self.find()]
    self.assertEqual(
      verdicts,
      [
        "undecided",  # One seed shares 0.6 of the keys, one 0.4.
        "holds",
        "holds",
        "does not hold",  # The task that is not learned hides a loss.
        "does not hold",
        "does not hold",  # Lower by 0.04 in the mean, in both seeds.
        "holds",
      ],
    )

  def test_verdicts_of_learned_tasks(self):
    self.assertEqual(paper_claims.learned_tasks(rows(**FREE)), {"needle"})
    found = self.find()
    self.assertEqual(found[0].learned_verdict, "")
    self.assertEqual(found[3].learned_verdict, "holds")
    self.assertEqual(
      found[3].learned_figures, "0.725 against 0.850; -0.050, -0.200"
    )

  def test_figures_are_of_pairs_within_a_seed(self):
    uniform = self.find()[1]
    self.assertEqual(uniform.figures, "0.300 against 0.567; -0.267, -0.267")

  def test_writes_a_page_where_all_tables_are(self):
    temporary = tempfile.TemporaryDirectory()
    self.addCleanup(temporary.cleanup)
    folder = pathlib.Path(temporary.name)
    self.assertIsNone(paper_claims.write(folder))
    for name, table in (
      ("overlap", OVERLAP),
      ("training_free", rows(**FREE)),
      ("training_aware", rows(**AWARE)),
    ):
      (folder / f"{name}.json").write_text(json.dumps(table))
    page = paper_claims.write(folder)
    self.assertEqual(page, (folder / "claims.md").read_text())
    self.assertIn("Seeds: 0, 1.", page)
    self.assertIn("-0.400, -0.400 | holds |", page)
    self.assertIn("| verdict | without variables | verdict |", page)


if __name__ == "__main__":
  absltest.main()
