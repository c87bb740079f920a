# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What every script needs: argument checks, atomic files, provenance."""

import concurrent.futures
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from absl import app, flags

import indexcache_jax as ic
from experiments import provenance

_DEBUG = flags.DEFINE_bool("debug", False, "Show where an error was raised.")


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a script's `main`; bad input ends in its message alone."""

  def guarded(argv):
    try:
      main(argv)
    except (ValueError, FloatingPointError) as error:
      if _DEBUG.value:
        raise
      sys.exit(f"{type(error).__name__}: {error}")

  app.run(guarded)


def reject_arguments(argv: list[str]) -> None:
  """Raises ValueError for words that are not flags."""
  if len(argv) > 1:
    raise ValueError(
      f"This script takes flags only: got {argv[1:]}. Try --help."
    )


def write_text(path: pathlib.Path, content: str) -> None:
  """Writes a whole file or, if interrupted, nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  temporary.write_text(content, encoding="utf-8")
  temporary.replace(path)


def write_records(
  path: pathlib.Path, records: list[dict], columns: Sequence[str]
) -> None:
  """Writes records as JSON lines and, beside them, some columns as a table.

  Args:
    path: ends in .jsonl; the table's ends in .md.
    records: one a line.
    columns: of the table, in order.
  """
  lines = [json.dumps(record) for record in records]
  write_text(path, "\n".join(lines) + "\n")
  rows = [table_cells(record, columns) for record in records]
  write_text(path.with_suffix(".md"), markdown_table(columns, rows) + "\n")


def require_compilation_cache(subject: str) -> None:
  """Raises ValueError unless JAX keeps programs that another call can find."""
  if not jax.config.jax_compilation_cache_dir:
    raise ValueError(
      f"{subject} hands programs over through JAX's compilation cache: got"
      " none. Set JAX_COMPILATION_CACHE_DIR to a folder."
    )


def compile_into_cache(
  lowered: Iterable[jax.stages.Lowered], jobs: int
) -> list[BaseException | None]:
  """Compiles programs, some at a time, for who compiles them again.

  Args:
    lowered: programs; the first are compiled while the next are lowered.
    jobs: at the same time; above 1 it needs JAX's compilation cache, whose
      shortest compilation it sets to 0 seconds.

  Returns:
    What each raised, None for most.

  Raises:
    ValueError: no cache.
  """
  require_compilation_cache("`--compile_jobs` above 1")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    compiling = [pool.submit(program.compile) for program in lowered]
    return [program.exception() for program in compiling]


def table_row(record: dict, columns: Sequence[str]) -> str:
  """A line of a table that is printed while it grows, see `table_head`."""
  return markdown_row(table_cells(record, columns))


def table_head(columns: Sequence[str]) -> str:
  """The two lines above the rows of a table."""
  return markdown_table(columns, [])


def table_cells(record: dict, columns: Sequence[str]) -> list[str]:
  """Floats to four digits, nothing where there is none."""
  cells = (record.get(column, "") for column in columns)
  return [f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table without a line's end behind it."""
  rule = "|---" * len(head) + "|"
  return "\n".join([markdown_row(head), rule, *map(markdown_row, rows)])


def markdown_row(cells: Sequence[str]) -> str:
  """A line of a table."""
  return f"| {' | '.join(cells)} |"


def count_parameters(config: ic.SparseTransformerConfig) -> int:
  """Parameters of a model, from shapes alone."""
  shapes = jax.eval_shape(
    ic.SparseTransformer(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
  )
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def environment() -> dict[str, str]:
  """Provenance of a result: device, versions, commit."""
  return {
    "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    "platform": jax.default_backend(),
    "jax": jax.__version__,
    **_cuda(),
    "python": platform.python_version(),
    "commit": provenance.commit(),
  }


def _cuda() -> dict[str, str]:
  """Versions of CUDA and of the driver, on GPUs alone."""
  if jax.default_backend() != "gpu":
    return {}
  return {
    "cuda": jax.devices()[0].client.platform_version.split()[-1],
    "driver": provenance.output(
      *("nvidia-smi", "--id=0"),
      *("--query-gpu=driver_version", "--format=csv,noheader"),
    ),
  }
