# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes the tables and the plot of `bench_inference` again from its records.

  python -m experiments.inference_tables --folder=results/inference

Expected: inference.md and inference.png beside the inference.jsonl of the
folder, which may hold several runs one after another; with a profile.jsonl of
`profile_layer` there, what its kernel times account for too. Needs no device.
"""

import json
import pathlib

from absl import flags

from experiments import common, inference_report

_FOLDER = flags.DEFINE_string(
  "folder", "results/inference", "With inference.jsonl, and profile.jsonl."
)


def main(argv):
  """Reads the records and writes what is made of them."""
  common.reject_arguments(argv)
  folder = pathlib.Path(_FOLDER.value)
  path, profile = folder / "inference.jsonl", folder / "profile.jsonl"
  if not path.is_file():
    raise ValueError(
      f"--folder must hold inference.jsonl of `bench_inference`: got {folder}."
    )
  inference_report.write(
    folder,
    [json.loads(line) for line in path.read_text().splitlines()],
    inference_report.read_profile(str(profile) if profile.is_file() else None),
  )
  print((folder / "inference.md").read_text())


if __name__ == "__main__":
  common.run(main)
