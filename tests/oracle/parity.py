# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares us with transformers, live, on freshly drawn models.

  python -m tests.oracle.parity --oracle_python=.oracle/bin/python

Runs in the project's environment and starts the oracle's own Python once, for
all cases. Prints a line a case and exits with 1 if any differs.
"""

import json
import pathlib
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator

import jax.numpy as jnp
from absl import app, flags

import indexcache_jax as ic
from tests.oracle import compare, draw

_ORACLE_PYTHON = flags.DEFINE_string(
  "oracle_python",
  ".oracle/bin/python",
  "Python of the environment of tests/oracle/requirements.txt.",
)
_SEED = flags.DEFINE_integer("seed", None, "Of the draw; default: the time.")
_NUM_CASES = flags.DEFINE_integer("num_cases", 30, "Models to draw.")
_FOLDER = flags.DEFINE_string(
  "folder", None, "Keeps the drawn checkpoints there; default: removed."
)


def run_oracle(
  cases: list[draw.Case], folder: pathlib.Path
) -> Iterator[tuple[str, int]]:
  """Makes the cases in the oracle's Python, yielding each as it is ready.

  Args:
    cases: to make.
    folder: of the drawn checkpoints.

  Yields:
    Name of a finished case and token batches drawn for it, see `oracle.py`;
    we compile one case while the oracle makes the next.
  """
  cases_path = folder / "cases.json"
  cases_path.write_text(json.dumps(cases, indent=1))
  command = [
    _ORACLE_PYTHON.value,
    "-m",
    "tests.oracle.oracle",
    str(cases_path),
    str(folder),
  ]
  with subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  ) as process:
    for line in process.stdout:
      if line.startswith("oracle: "):
        _, name, num_draws = line.split()
        yield name, int(num_draws)
  if process.returncode:
    raise RuntimeError(
      f"the oracle must run to its end: got exit status {process.returncode}"
      f" of {' '.join(command)}. Its message stands above."
    )


def compare_case(folder: pathlib.Path) -> list[compare.Comparison]:
  """Returns one comparison for each context length of a case."""
  config, params = ic.load_checkpoint(folder, dtype=jnp.float32)
  tokens = compare.load_tokens(folder)
  return [
    compare.compare(
      compare.run(config, params, tokens[:, :length]),
      compare.load_expected(folder, length),
    )
    for length in compare.load_lengths(folder)
  ]


def _describe(case):
  config = case["config"]
  num_sparse = config["mlp_layer_types"].count("sparse")
  return (
    f"{case['name']}: L={config['num_hidden_layers']} ({num_sparse} MoE)"
    f" I={config['index_n_heads']} K={config['index_topk']}"
    f" S={case['lengths'][0]} groups={config['n_group']}"
    f" rope={config['rope_parameters']['rope_type']}"
    f" bias={config['attention_bias']}"
  )


def _passes(case, folder):
  """Prints one line; an error of ours fails its case, not the run."""
  try:
    comparisons = compare_case(folder / case["name"])
  except Exception:  # Whatever a wrong loader or model may raise.
    traceback.print_exc()
    print(f"FAIL {_describe(case)}: raised", flush=True)
    return False
  is_equal = all(comparison.is_equal for comparison in comparisons)
  print(
    "ok  " if is_equal else "FAIL",
    f"{_describe(case)}: {'; '.join(map(str, comparisons))}",
    flush=True,
  )
  return is_equal


def main(argv) -> None:
  """Draws, runs and compares."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  if shutil.which(_ORACLE_PYTHON.value) is None:
    raise app.UsageError(
      "--oracle_python must be the Python of an environment with"
      f" tests/oracle/requirements.txt: got {_ORACLE_PYTHON.value!r}, which is"
      " no program. tests/golden/README.md says how to make one."
    )
  seed = int(time.time()) if _SEED.value is None else _SEED.value
  print(f"parity with --seed={seed}, {_NUM_CASES.value} cases", flush=True)
  cases = draw.draw_cases(seed, _NUM_CASES.value)
  by_name = {case["name"]: case for case in cases}
  num_passed = num_redrawn = 0
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(_FOLDER.value or temporary).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name, num_draws in run_oracle(cases, folder):
      num_passed += _passes(by_name[name], folder)
      num_redrawn += num_draws - 1
  num_failed = len(cases) - num_passed
  print(f"{num_redrawn} token batches with a near tie were drawn anew")
  print(f"{num_passed} passed, {num_failed} failed (--seed={seed})")
  if num_failed:
    raise SystemExit(1)


if __name__ == "__main__":
  app.run(main)
