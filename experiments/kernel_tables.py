# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes the tables of `bench_kernels` from its records.

  python -m experiments.kernel_tables --folder=results/kernels

Expected: kernels.md beside the kernels.jsonl of the folder, which may hold
several runs one after another: a workload's last time counts. With a
yardsticks.json there, also its figures beside what was wanted and beside other
kernels. Needs no device.
"""

import json
import pathlib

from absl import flags

from experiments import common, kernel_report

_FOLDER = flags.DEFINE_string(
  "folder", "results/kernels", "With kernels.jsonl, and yardsticks.json."
)


def main(argv):
  """Reads the records and writes what is made of them."""
  common.reject_arguments(argv)
  folder = pathlib.Path(_FOLDER.value)
  path = folder / "kernels.jsonl"
  if not path.is_file():
    raise ValueError(
      f"--folder must hold kernels.jsonl of `bench_kernels`: got {folder}."
    )
  lines = path.read_text(encoding="utf-8").splitlines()
  figures = kernel_report.latest(map(json.loads, lines))
  parts = ["# Kernels", kernel_report.whole_table(figures)]
  path = folder / "yardsticks.json"
  if path.is_file():
    yardsticks = json.loads(path.read_text(encoding="utf-8"))
    parts += [
      "## Beside what was wanted, and beside CUDA kernels",
      yardsticks["note"],
      kernel_report.yardstick_table(figures, yardsticks["yardsticks"]),
      "## A million keys",
      kernel_report.length_table(figures, yardsticks["lengths"]),
    ]
  common.write_text(folder / "kernels.md", "\n\n".join(parts) + "\n")
  print((folder / "kernels.md").read_text())


if __name__ == "__main__":
  common.run(main)
