# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The paper's experiment from nothing to its tables, on all GPUs of a machine.

  python -m experiments.paper_all --dtype=bfloat16 --seeds=0,1,2 \
    --devices=0,1 --output_dir=runs/paper

Each part of `paper_runs` is a process of its own, for a small model leaves most
of a large GPU idle while it compiles and launches. While the base models train,
processors compile what the first seed's variants will need, into a cache that
all seeds share. Whatever is finished is left as it is: after --max_minutes, or
a signal, the same command goes on from the last saved steps.

Expected: `seedN/` as `paper_runs` leaves it, with each table's measurements,
`logs/`, and in the end `tables/`: those of `paper_tables` over all seeds.
"""

import math
import os
import pathlib
import sys
import time

from absl import flags

from experiments import (
  common,
  inputs,
  paper_recipe,
  processes,
  training_loop,
)

_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the models.")
_VARIANTS = flags.DEFINE_multi_enum(
  "variant",
  list(paper_recipe.VARIANTS),
  list(paper_recipe.VARIANTS),
  "To train from each base model. Table 3 of a seed is measured once, after"
  " all that are named.",
)
_SCALE = flags.DEFINE_float("scale", 1.0, "As that of `paper_runs`.")
_DEVICES = flags.DEFINE_list(
  "devices", ["0"], "GPUs to use, by CUDA's numbers."
)
_PER_DEVICE = flags.DEFINE_integer(
  "processes_per_device", 3, "Parts at a time on each.", lower_bound=1
)
_COMPILERS = flags.DEFINE_integer(
  "compile_jobs", 4, "Processes that compile ahead.", lower_bound=0
)
_MAX_MINUTES = flags.DEFINE_float(
  "max_minutes", math.inf, "After these each part saves its state and ends."
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/paper", "Of runs, logs and tables."
)


def main(argv):
  """Runs what is missing; exits with 1 if any of it failed."""
  common.reject_arguments(argv)
  folder = pathlib.Path(_OUTPUT_DIR.value).absolute()
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
  # Several processes share a device.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  runner = processes.Runner(
    all_tasks(folder),
    processes.Places(
      devices=_DEVICES.value,
      per_device=_PER_DEVICE.value,
      compilers=_COMPILERS.value,
    ),
    folder / "logs",
    training_loop.deadline_after(_MAX_MINUTES.value),
  )
  begin = time.monotonic()
  outcomes = runner.run()
  for outcome in ("failed", "unfinished", "not started"):
    names = [name for name, found in outcomes.items() if found == outcome]
    if names:
      print(f"{outcome}: {', '.join(names)}")
  minutes = (time.monotonic() - begin) / 60
  if set(outcomes.values()) == {"done"}:
    print(f"All done after {minutes:.1f} minutes: {folder / 'tables'}")
  else:
    print(f"{minutes:.1f} minutes. The same command goes on.")
  sys.exit("failed" in outcomes.values())


def all_tasks(folder: pathlib.Path) -> list[processes.Task]:
  """Of all seeds: base models first, then what needs them, tables last."""
  for name, value in (("seeds", _SEEDS.value), ("devices", _DEVICES.value)):
    if not value or not all(word.isdigit() for word in value):
      raise ValueError(
        f"--{name} must be whole numbers from 0, one or more: got"
        f" {','.join(value)!r}. For example --{name}=0,1."
      )
  seeds = [_Seed(folder, int(seed)) for seed in dict.fromkeys(_SEEDS.value)]
  compiled = _compilations(seeds[0]) if _COMPILERS.value else []
  untrained = [seed.measure_untrained() for seed in seeds]
  trained = [seed.measure_trained() for seed in seeds]
  tables = processes.Task(
    name="tables",
    command=lambda _: _command(
      "paper_tables",
      "--runs=" + ",".join(str(seed.folder) for seed in seeds),
      f"--output_dir={folder / 'tables'}",
    ),
    # Every time, for there may be more seeds than the last time; and alone on
    # the machine, for the last of them holds times.
    needs=[task.name for task in (*untrained, *trained)],
  )
  return [
    *(seed.base() for seed in seeds),
    *compiled,
    *(seed.search() for seed in seeds),
    *untrained,
    *(
      seed.variant(name, compiled) for name in _VARIANTS.value for seed in seeds
    ),
    *trained,
    tables,
  ]


class _Seed:
  """The tasks of one seed."""

  def __init__(self, folder, number):
    self.folder = folder / f"seed{number}"
    self._number = number

  def base(self):
    return self._task("base", is_done=self.has_checkpoint("base"))

  def search(self):
    return self._task(
      "search", is_done=(self.folder / "search.json").exists, needs=["base"]
    )

  def variant(self, name, compiled):
    needs = ["base"]
    if paper_recipe.VARIANTS[name].rule == "searched":
      needs.append("search")
    return self._task(
      name,
      is_done=self.has_checkpoint(name),
      needs=needs,
      compilations=[
        task.name for task in compiled if task.name == _compiled_name(name)
      ],
    )

  def measure_untrained(self):
    """Tables 1, 2 and 5, measured and written for this seed."""
    return self._measurement(
      ["overlap", "training_free", "single_layers"], needs=["search"]
    )

  def measure_trained(self):
    """Table 3 of this seed."""
    return self._measurement(
      ["training_aware"], needs=["base", *_VARIANTS.value]
    )

  def _measurement(self, tables, needs):
    return processes.Task(
      name=self._name("_".join(["tables", *tables])),
      command=lambda _: _command(
        "paper_tables",
        *(f"--table={name}" for name in tables),
        f"--runs={self.folder}",
        f"--output_dir={self.folder / 'tables'}",
      ),
      is_done=lambda: all(
        (self.folder / f"{name}.json").exists() for name in tables
      ),
      needs=[self._name(part) for part in needs],
    )

  def command(self, part, *arguments):
    """That does one part."""
    return _command(
      "paper_runs",
      f"--part={part}",
      f"--seed={self._number}",
      f"--scale={_SCALE.value}",
      f"--output_dir={self.folder}",
      *arguments,
    )

  def _task(self, part, *, is_done, needs=(), compilations=()):
    def command(minutes):
      limit = []
      if minutes < math.inf:
        limit = [f"--max_minutes={max(minutes, 0.1):.2f}"]
      return self.command(part, *limit)

    return processes.Task(
      name=self._name(part),
      command=command,
      is_done=is_done,
      needs=[*map(self._name, needs), *compilations],
    )

  def _name(self, part):
    return f"seed{self._number}_{paper_recipe.folder_name(part)}"

  def has_checkpoint(self, part):
    return (self.folder / paper_recipe.folder_name(part) / "checkpoint").exists


def _compilations(seed):
  """Of what trains the parts whose schedule is known before the search."""
  parts = ["base"] + [
    name
    for name in _VARIANTS.value
    if paper_recipe.VARIANTS[name].rule != "searched"
  ]
  return [
    processes.Task(
      name=_compiled_name(part),
      command=lambda _, part=part: seed.command(part, "--compile_only"),
      trains=False,
    )
    for part in parts
    if not seed.has_checkpoint(part)()
  ]


def _compiled_name(part):
  return f"compile_{paper_recipe.folder_name(part)}"


def _command(script, *arguments):
  shared = [f"--dtype={inputs.DTYPE.value}"]
  if inputs.SMOKE.value:
    shared.append("--smoke")
  shared += [f"--text={name}" for name in inputs.TEXT.value]
  return [sys.executable, "-m", f"experiments.{script}", *shared, *arguments]


if __name__ == "__main__":
  common.run(main)
