# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks' sources, each in a fresh kernel, from top to bottom.

  python tools/run_notebooks.py            writes notebooks/*.ipynb with outputs
  python tools/run_notebooks.py --check    runs them small and writes nothing

The sources are notebooks/*.py in jupytext's percent format, so that changes can
be read; the .ipynb files are what Colab opens. Fails on the first cell that
raises, and on an .ipynb whose cells are not those of its source.
"""

import argparse
import os
import pathlib
import sys
import time

import jupytext
import nbclient
import nbformat

_FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks"


def main() -> int:
  """Runs all notebooks; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--check", action="store_true", help="small, no output")
  is_check = parser.parse_args().check
  failed = 0
  sources = sorted(_FOLDER.glob("*.py"))
  for source in sources:
    start = time.time()
    notebook = jupytext.read(source)
    if is_check and not _is_current(source, notebook):
      print(f"{source.stem}: its .ipynb is stale: run `make notebooks`")
      failed += 1
      continue
    error = _run(notebook, is_check)
    failed += error is not None
    print(f"{source.stem}: {error or 'ok'} ({time.time() - start:.0f} s)")
    if not is_check and error is None:
      _write(notebook, source.with_suffix(".ipynb"))
  print(f"{len(sources) - failed} passed, {failed} failed")
  return int(failed > 0)


def _run(notebook, is_check) -> str | None:
  """Executes in place; returns the error of the cell that raised."""
  environment = dict(os.environ)
  if is_check:
    environment["INDEXCACHE_SMOKE"] = "1"
  client = nbclient.NotebookClient(
    notebook, timeout=600, resources={"metadata": {"path": str(_FOLDER.parent)}}
  )
  try:
    client.execute(env=environment)
  except nbclient.exceptions.CellExecutionError as error:
    return str(error)
  return None


def _is_current(source, notebook) -> bool:
  path = source.with_suffix(".ipynb")
  if not path.exists():
    return False
  committed = nbformat.read(path, as_version=4)
  return [(c.cell_type, c.source) for c in committed.cells] == [
    (c.cell_type, c.source) for c in notebook.cells
  ]


def _write(notebook, path):
  """Writes the whole file or, if interrupted, nothing."""
  for number, cell in enumerate(notebook.cells):
    cell["id"] = f"cell-{number}"  # Stable, for readable diffs.
    cell.metadata.pop("execution", None)
  temporary = path.with_suffix(".tmp")
  nbformat.write(notebook, temporary)
  temporary.replace(path)


if __name__ == "__main__":
  sys.exit(main())
