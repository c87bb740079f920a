# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the device tests of every op on the GPU that is here.

  python -m tests.gpu.run_tests [--ops=topk] [--jobs=7] [--log=FILE]

Each module runs in child processes under a watchdog; what they write is in
`--output_dir` as it is written.
"""

import concurrent.futures
import pathlib
import sys

from absl import app, flags

from tests.gpu import device, reports, sharding

_OPS = flags.DEFINE_list(
  "ops",
  list(sharding.TESTED),
  "Ops, hopper, dispatch, training, generation.",
)
_JOBS = flags.DEFINE_integer(
  "jobs", 1, "Processes at the same time.", lower_bound=1
)
_LOG = flags.DEFINE_string("log", "", "Also write the log here.")
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/test-gpu", "Where the output of each process goes."
)
_TIMEOUT = flags.DEFINE_integer("timeout", 900, "Seconds for one process.")


def main(_):
  chosen = sharding.shards(_OPS.value)
  with device.log(_LOG.value) as tell:
    failed = num_cases = 0
    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
      futures = [pool.submit(run, shard) for shard in chosen]
      for future in concurrent.futures.as_completed(futures):
        child = future.result()
        failed += not child.passed
        num_cases += reports.num_cases(child.output)
        tell(child.line, *child.fault.splitlines())
    tell(
      f"{len(chosen) - failed} processes passed, {failed} failed;"
      f" {num_cases} generated cases"
    )
  sys.exit(failed > 0)


def run(shard: sharding.Shard) -> device.Child:
  """Runs some tests in a child process."""
  name = shard.module.removesuffix("_test")
  if shard.total > 1:
    name += f" {shard.index + 1} of {shard.total}"
  return device.run_child(
    name,
    device.python("-m", f"tests.gpu.{shard.module}"),
    timeout=_TIMEOUT.value,
    log_dir=pathlib.Path(_OUTPUT_DIR.value),
    # What `absltest.main` goes by.
    environment={
      "TEST_TOTAL_SHARDS": str(shard.total),
      "TEST_SHARD_INDEX": str(shard.index),
    },
  )


if __name__ == "__main__":
  app.run(main)
