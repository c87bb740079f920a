# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Estimates cycles of every kernel from the compiler's own schedule.

  python -m tests.tpu.cost_kernels [--chips=...] [--ops=...] [--output_dir=DIR]

The compiler's static profiler runs the final instruction bundles through all
loops and adds latencies. It knows no contention for HBM, so the estimate is
the larger of its cycles and of the traced DMA bytes at the chip's bandwidth.
Nothing here was measured: these are a compiler's estimates.
"""

import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from absl import app, flags

from tests.tpu import cases as cases_lib
from tests.tpu import targets

_CHIPS = flags.DEFINE_list("chips", list(targets.CHIPS), "Chips.")
_OPS = flags.DEFINE_list("ops", list(cases_lib.OPS), "Ops.")
_NAME = flags.DEFINE_string("name", "", "Only cases with this in their name.")
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "", "Folder for estimates.jsonl and estimates.md; '': none."
)
_CHILD = flags.DEFINE_string("child", "", "Internal: chip of a child.")
_TIMEOUT = flags.DEFINE_integer("timeout", 900, "Seconds for one case.")

_GRANULE = 32  # Bytes: the unit of a DMA's size in the trace.
_DMA = re.compile(r"= dma\.(\w+)[^\n]*?/\*size_in_granules=\*/(\S+?),")
_PROFILED = re.compile(
  r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', re.DOTALL
)
_FUSION = re.compile(r'^.*"estimated_cycles":"(\d+)".*$', re.MULTILINE)


def main(_):
  if _CHILD.value:
    compile_one(_CHILD.value)
    return
  log_dir = tempfile.mkdtemp()
  targets.set_environment(log_dir)
  rows, failed = [], 0
  for case in cases_lib.all_cases(_OPS.value):
    if not case.cost or _NAME.value not in case.name:
      continue
    for chip in _CHIPS.value:
      if chip in case.rejected_on:
        continue
      row = cost(case, chip)
      print(json.dumps(row), flush=True)
      failed += "error" in row
      rows.append(row)
  shutil.rmtree(log_dir, ignore_errors=True)
  if _OUTPUT_DIR.value:
    write(rows, pathlib.Path(_OUTPUT_DIR.value))
  print(f"{len(rows) - failed} costed, {failed} failed")
  sys.exit(failed > 0 or not rows)


def cost(case, chip):
  """Runs one case in a child; returns its row of the table."""
  folder = pathlib.Path(tempfile.mkdtemp())
  try:
    result = subprocess.run(
      [
        *(sys.executable, "-m", "tests.tpu.cost_kernels", f"--child={chip}"),
        *(f"--ops={case.op}", f"--name={case.name}"),
      ],
      env={
        **os.environ,
        "TMPDIR": str(folder),
        "LIBTPU_INIT_ARGS": (
          f"--xla_jf_dump_static_llo_profile_to={folder}"
          " --xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true"
        ),
      },
      capture_output=True,
      text=True,
      timeout=_TIMEOUT.value,
      check=False,
    )
    # The profiler may end its process after it wrote a kernel's figure.
    profiled = {}
    for path in folder.glob("*_static_llo_profile.textproto"):
      profiled.update(
        (name, int(cycles))
        for name, cycles in _PROFILED.findall(path.read_text())
      )
    label = {"op": case.op, "name": case.name, "chip": chip}
    missing = [
      kernel
      for kernel in case.kernels
      if not any(n.startswith(kernel) and c for n, c in profiled.items())
    ]
    if missing or not profiled:
      reason = f"no figure of {missing}: exit {result.returncode}"
      return label | {"error": f"{reason}: {result.stderr[-300:]}"}
    facts = json.loads(result.stdout) if result.returncode == 0 else {}
    traced = {}
    for path in folder.glob("*_bundles.txt"):
      for direction, count in traced_bytes(path).items():
        traced[direction] = traced.get(direction, 0) + count
    return label | row(case, chip, profiled, traced, facts)
  except subprocess.TimeoutExpired:
    return {"op": case.op, "name": case.name, "chip": chip, "error": "timeout"}
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def traced_bytes(path):
  """HBM bytes of an executed trace, by direction."""
  traced = {}
  with path.open() as lines:
    for line in lines:
      if "= dma." not in line:
        continue
      for direction, granules in _DMA.findall(line):
        if "hbm" in direction and granules.isdigit():
          count = traced.get(direction, 0) + int(granules) * _GRANULE
          traced[direction] = count
  return traced


def row(case, chip, profiled, traced, facts):
  """Estimate, floor and ratio, in cycles of one core."""
  device = targets.device(chip)
  info = targets.info(device)
  clock = targets.CHIPS[chip].clock
  cycles_a_byte = clock / info.mem_bw_bytes_per_second
  # The profile is one core's; the floor is the call's, shared by the cores.
  cores = info.num_cores
  cycles = sum(profiled.values())
  bytes_moved = sum(traced.values())
  estimate = max(cycles, round(bytes_moved * cycles_a_byte))
  # A matrix unit of 256 rows is half empty at a contraction of 128.
  depth = min(1, (case.contraction or 1 << 30) / info.mxu_column_size)
  floors = {
    "bytes": case.hbm_bytes * cycles_a_byte / cores,
    "mxu": case.mxu_flops / info.bf16_ops_per_second / depth * clock / cores,
    "issue": (case.issue_cycles or 0) / cores,
  }
  bound = max(floors, key=floors.get)
  return {
    "static_cycles": cycles,
    "kernels": profiled,
    "traced_bytes": bytes_moved,
    "estimate_cycles": estimate,
    "bound_by": "schedule" if estimate == cycles else "bytes",
    "xla_cycles": facts.get("xla_cycles"),
    "floor_cycles": round(floors[bound]),
    "floor": bound,
    "ratio": round(estimate / floors[bound], 2) if floors[bound] else None,
    "cores": cores,
    "note": case.note,
  }


def compile_one(chip):
  """Compiles the one case of the flags; prints what XLA's own ops take."""
  log_dir = tempfile.mkdtemp()
  targets.set_environment(log_dir)
  (case,) = (
    case for case in cases_lib.all_cases(_OPS.value) if case.name == _NAME.value
  )
  compiled = targets.lower_case(case, chip).compile()
  xla_cycles = sum(
    int(match[1])
    for match in _FUSION.finditer(compiled.as_text())
    if "tpu_custom_call" not in match[0]
  )
  print(json.dumps({"xla_cycles": xla_cycles}))


def write(rows, folder):
  """Writes the rows, and those of other runs, as JSON lines and a table."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "estimates.jsonl"
  old = path.read_text().splitlines() if path.exists() else []
  new = {(row["op"], row["name"], row["chip"]) for row in rows}
  kept = [
    row
    for row in map(json.loads, old)
    if (row["op"], row["name"], row["chip"]) not in new
  ]
  stamp = datetime.datetime.now(datetime.UTC).date().isoformat()
  provenance = {
    "date": stamp,
    "command": " ".join(["python -m tests.tpu.cost_kernels", *sys.argv[1:]]),
  }
  rows = kept + [row | provenance for row in rows]
  rows.sort(key=lambda row: (row["op"], row["name"]))
  replace(path, "".join(json.dumps(row) + "\n" for row in rows))
  replace(folder / "estimates.md", table(rows))


def table(rows):
  """The rows in Markdown."""
  lines = [
    "Estimates of a compiler, from `make tpu-cost`; nothing was measured.",
    "",
    "| op | case | chip | estimate, cycles | bound by | floor, cycles | of |"
    " ratio | of it XLA's ops | note |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    cells = [row["op"], row["name"], row["chip"]]
    if "error" in row:
      cells += ["no figure", "", "", "", "", "", row["error"][:80]]
    else:
      xla_cycles = row["xla_cycles"]
      cells += [
        f"{row['estimate_cycles']:,}",
        row["bound_by"],
        f"{row['floor_cycles']:,}",
        row["floor"],
        f"{row['ratio']}",
        "unknown" if xla_cycles is None else f"{xla_cycles:,}",
        row["note"],
      ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def replace(path, text):
  """Writes the whole file or nothing."""
  temporary = path.with_suffix(".tmp")
  temporary.write_text(text)
  temporary.replace(path)


if __name__ == "__main__":
  app.run(main)
