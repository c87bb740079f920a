# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Times the kernels on a GPU, beside the ceilings of the same run.

  python -m experiments.bench_kernels --ops=top_k,sparse_mla --shapes=131072

Each workload is checked before it is timed. A line of JSON a number: isolated
(median of the driver's kernel times, caches flushed before each) and sustained
(median of batches, back to back, where the card's power limit counts); the
rate; its share of the ceiling, which is the library's matrix product of the
same dtype, or a copy; and what the program holds beside arguments and results.
"""

import datetime
import pathlib
from collections.abc import Iterator

import jax
from absl import flags, logging

from experiments import common, kernel_timing, kernel_workloads, provenance

_OPS = flags.DEFINE_list("ops", [], "Ops; none: all.")
_SHAPES = flags.DEFINE_list(
  "shapes", [], "Only workloads with one of these words in their name."
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/kernels", "Where kernels.jsonl and kernels.md go."
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 7, "Isolated launches a median.", lower_bound=1
)
_JOBS = flags.DEFINE_integer(
  "compile_jobs", 1, "Programs compiled at the same time.", lower_bound=1
)
_LAUNCHES = flags.DEFINE_integer(
  "launches", 40, "Back-to-back launches, of all batches.", lower_bound=1
)

_COLUMNS = (
  *("op", "shape", "mode", "ms", "min_ms", "max_ms", "rate", "unit"),
  *("share", "error", "temp_mib", "fault"),
)


def main(argv):
  """Checks, times, prints a table and writes it."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  chosen = choose(_OPS.value, _SHAPES.value)
  kernel_timing.require_gpu("bench_kernels")
  source = {
    **common.environment(),
    "command": provenance.command(),
    "date": datetime.date.today().isoformat(),
  }
  path = pathlib.Path(_OUTPUT_DIR.value) / "kernels.jsonl"
  if _JOBS.value > 1:
    common.compile_into_cache(lower_all(chosen), _JOBS.value)
  ceilings = measure_ceilings({w.ceiling for w in chosen})
  records = [{**record, **source} for record in ceiling_records(ceilings)]
  for workload in chosen:
    for record in bench(workload, ceilings):
      records.append({**record, **source})
      print(common.table_row(record, _COLUMNS), flush=True)
    common.write_records(path, records, _COLUMNS)
  failed = [r for r in records if r.get("fault")]
  if failed:
    raise ValueError(f"{len(failed)} workloads failed their check: {failed}")


def choose(
  ops: list[str], shapes: list[str]
) -> list[kernel_workloads.Workload]:
  """Workloads that the flags ask for."""
  every = kernel_workloads.workloads()
  known = sorted({w.op for w in every})
  unknown = [op for op in ops if op not in known]
  if unknown:
    raise ValueError(f"`--ops` must be among {known}: got {unknown}.")
  chosen = [
    w
    for w in every
    if (not ops or w.op in ops)
    and (not shapes or any(word in w.name for word in shapes))
  ]
  if not chosen:
    raise ValueError(
      f"`--shapes` must be a word of a workload's name: got {shapes}; there"
      f" are {[w.name for w in every if not ops or w.op in ops]}."
    )
  return chosen


def lower_all(
  chosen: list[kernel_workloads.Workload],
) -> Iterator[jax.stages.Lowered]:
  """Both programs of each workload, for shapes alone; of those that lower."""
  for workload in chosen:
    try:
      args = jax.eval_shape(workload.make, jax.random.key(0))
      yield jax.jit(workload.function).lower(*args)
      yield kernel_timing.after_flush(workload.function).lower(
        kernel_timing.FLUSHED, *args
      )
    except Exception:
      # It is that workload's result, which `bench` records.
      continue


def measure_ceilings(names: set[str]) -> dict[str, dict[str, float]]:
  """TFLOP/s or TB/s of the card, by ceiling and mode."""
  return {
    name: kernel_timing.copy_ceiling()
    if name == "copy"
    else kernel_timing.matmul_ceiling(name)
    for name in sorted(names)
  }


def ceiling_records(ceilings: dict[str, dict[str, float]]) -> list[dict]:
  """Records of the ceilings, without a time."""
  return [
    {
      "op": "ceiling",
      "shape": name,
      "mode": mode,
      "rate": rate,
      "unit": "TB/s" if name == "copy" else "TFLOP/s",
    }
    for name, modes in ceilings.items()
    for mode, rate in modes.items()
  ]


def bench(
  workload: kernel_workloads.Workload, ceilings: dict[str, dict[str, float]]
) -> list[dict]:
  """Records of one workload: isolated and sustained, or its fault."""
  record = {"op": workload.op, "shape": workload.name}
  try:
    args = workload.make(jax.random.key(0))
    run = jax.jit(workload.function).lower(*args).compile()
    record["temp_mib"] = run.memory_analysis().temp_size_in_bytes / 2**20
    record["error"] = workload.error(args, run(*args))
    if not record["error"] <= workload.tolerance:
      return [{**record, "fault": f"error above {workload.tolerance}"}]
    found = measure(workload, run, args)
  except Exception as fault:
    # One kernel's fault is a result; the others are still wanted.
    return [{**record, "fault": f"{type(fault).__name__}: {fault}"[:500]}]
  return [
    {**record, **times, **rate(workload, times, ceilings)} for times in found
  ]


def measure(workload: kernel_workloads.Workload, run, args) -> list[dict]:
  """Times of both modes.

  Args:
    workload: whose function is timed.
    run: that function, compiled.
    args: of it.
  """
  sustained = kernel_timing.sustained_ms(run, *args, launches=_LAUNCHES.value)
  return [
    {
      "mode": "isolated",
      "ms": kernel_timing.isolated_ms(
        workload.function, *args, repeats=_REPEATS.value
      ),
    },
    {
      "mode": "sustained",
      "ms": sustained.median,
      "min_ms": sustained.min,
      "max_ms": sustained.max,
    },
  ]


def rate(workload: kernel_workloads.Workload, times: dict, ceilings) -> dict:
  """What the times of a mode come to, alone and beside the ceiling."""
  found = workload.work / times["ms"] / 1e9
  return {
    "rate": found,
    "unit": workload.unit,
    "share": found / ceilings[workload.ceiling][times["mode"]],
    "ceiling": workload.ceiling,
  }


if __name__ == "__main__":
  common.run(main)
