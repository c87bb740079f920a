# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest

from experiments import kernel_report, kernel_workloads


def record(shape="8x64", mode="sustained", ms=2.0, rate=1500.0, **changes):
  return {
    "op": "top_k",
    "shape": shape,
    "mode": mode,
    "ms": ms,
    "rate": rate,
    "unit": "TFLOP/s",
    "share": 0.5,
    "error": 0.0,
    "commit": "abc",
  } | changes


def yardstick(**changes):
  return {"op": "top_k", "shape": "8x64", "mode": "sustained"} | changes


def cells(table, line=2):
  return [cell.strip() for cell in table.splitlines()[line].split("|")[1:-1]]


class ReportTest(absltest.TestCase):
  def test_the_last_time_counts(self):
    records = [
      {"op": "ceiling", "shape": "copy", "mode": "isolated", "rate": 4.0},
      record(ms=1.0),
      record(mode="isolated", ms=0.05, temp_mib=3.0),
      record(ms=2.0),
    ]
    figures = kernel_report.latest(records)
    table = kernel_report.whole_table(figures)
    self.assertLen(table.splitlines(), 3)
    self.assertEqual(
      cells(table),
      [
        *("top_k", "8x64", "50 us", "2 ms", "1500 TFLOP/s", "1500 TFLOP/s"),
        *("0.50, 0.50", "", "0", "abc"),
      ],
    )

  def test_yardsticks(self):
    figures = kernel_report.latest([record()])
    for changes, reached, peer in (
      ({"unit": "TFLOP/s", "must": 1400, "aim": 1600}, "must", ""),
      ({"unit": "TFLOP/s", "must": 1400, "aim": 1500}, "aim", ""),
      ({"unit": "TFLOP/s", "must": 3000}, "50.0%", ""),
      ({"unit": "ms", "must": 3.0, "aim": 1.0}, "must", ""),
      ({"unit": "us", "must": 1000, "peer": 3000}, "50.0%", "1.50x"),
      ({"unit": "TFLOP/s", "peer": 1000}, "", "1.50x"),
    ):
      with self.subTest(**changes):
        one = yardstick(peer_name="another", **changes)
        line = cells(kernel_report.yardstick_table(figures, [one]))
        self.assertEqual((line[5], line[7]), (reached, peer))

  def test_what_is_not_measured_is_said(self):
    line = cells(kernel_report.yardstick_table({}, [yardstick(must=3)]))
    self.assertEqual(line[2:6], ["3", "", "not measured", ""])
    pair = {"op": "top_k", "shape": "8x64", "longer": "1x512"}
    line = cells(kernel_report.length_table({}, [pair]))
    self.assertEqual(line[:4], ["top_k", "8x64", "1x512", "not measured"])

  def test_yardsticks_are_of_workloads(self):
    path = pathlib.Path("results/kernels/yardsticks.json")
    found = json.loads(path.read_text())
    names = {(w.op, w.name) for w in kernel_workloads.workloads()}
    for one in (*found["yardsticks"], *found["lengths"]):
      for key in {"shape", "longer"} & set(one):
        self.assertIn((one["op"], one[key]), names)

  def test_a_yardstick_of_another_unit_is_refused(self):
    figures = kernel_report.latest([record()])
    with self.assertRaisesRegex(ValueError, "got 'TB/s' for top_k 8x64"):
      kernel_report.yardstick_table(figures, [yardstick(unit="TB/s")])

  def test_ratio_of_lengths(self):
    figures = kernel_report.latest(
      [record(), record(shape="1x512", rate=1200.0, temp_mib=7.5)]
    )
    pair = {"op": "top_k", "shape": "8x64", "longer": "1x512"}
    line = cells(kernel_report.length_table(figures, [pair]))
    self.assertEqual(line[-2:], ["0.80", "7.5"])

  def test_makes_the_tables_of_a_folder(self):
    temporary = tempfile.TemporaryDirectory()
    self.addCleanup(temporary.cleanup)
    folder = pathlib.Path(temporary.name)
    (folder / "kernels.jsonl").write_text(json.dumps(record()) + "\n")
    (folder / "yardsticks.json").write_text(
      json.dumps({"note": "A note.", "yardsticks": [], "lengths": []})
    )
    command = [sys.executable, "-m", "experiments.kernel_tables"]
    done = subprocess.run(
      [*command, f"--folder={folder}"], capture_output=True, text=True
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    page = (folder / "kernels.md").read_text()
    self.assertIn("| top_k | 8x64 |", page)
    self.assertIn("A note.", page)
    done = subprocess.run(
      [*command, f"--folder={folder / 'none'}"], capture_output=True, text=True
    )
    self.assertIn("--folder must hold kernels.jsonl", done.stderr)


if __name__ == "__main__":
  absltest.main()
