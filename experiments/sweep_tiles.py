# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Times the alternatives to each GPU kernel's tiles.

  python -m experiments.sweep_tiles --ops=top_k,indexer_scores

Each variant is checked before it is timed: isolated, the median of the driver's
kernel times with cold caches. A line of JSON a variant; `chosen` marks what the
code has. A row where another is faster by more than the noise of a few percent
says to change the table beside the kernel.
"""

import datetime
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

import pallas_kernels
from experiments import common, kernel_timing, provenance
from pallas_kernels.dense_attention import mosaic_gpu as dense_attention
from pallas_kernels.grouped import mosaic_gpu as grouped
from pallas_kernels.indexer import mosaic_gpu as indexer
from pallas_kernels.topk import mosaic_gpu as topk

_OPS = flags.DEFINE_list("ops", [], "Ops; none: all.")
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/kernels", "Where tiles.jsonl and tiles.md go."
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 5, "Launches a median.", lower_bound=1
)

_COLUMNS = (
  *("op", "shape", "tiles", "chosen", "ms", "ratio", "error", "fault"),
)
# Queries or rows that are compared with the reference, in float32.
_FEW = 8
_K = 2048
_SCALE = 192**-0.5


class Workload(NamedTuple):
  """A call that tiles are tried on.

  Attributes:
    op: the public function.
    shape: a word on the arguments.
    make: the arguments, of a key.
    function: of the arguments and `tiles`.
    expected: the reference's result of `_FEW` rows, of the arguments.
    few: those rows of a result.
    tolerance: of their relative error; 0 where they must be equal.
  """

  op: str
  shape: str
  make: Callable
  function: Callable
  expected: Callable
  few: Callable
  tolerance: float


class Sweep(NamedTuple):
  """Alternatives for one workload; the first is what the code has."""

  workload: Workload
  variants: tuple[Any, ...]


def _normal(key, shape, dtype=jnp.bfloat16):
  # Jitted, lest a float32 copy of the largest arrays is made.
  return jax.jit(
    lambda key: jax.random.normal(key, shape, jnp.float32).astype(dtype)
  )(key)


def _causal_bounds(batch, queries, num_keys):
  """The queries are the last tokens; each sees itself and all before."""
  end = num_keys - queries + 1 + jnp.arange(queries, dtype=jnp.int32)
  end = jnp.broadcast_to(end, (batch, queries))
  return jnp.zeros_like(end), end


def _last(x):
  return x[:, -_FEW:]


def _widened(*arrays):
  return (x.astype(jnp.float32) for x in arrays)


def _top_k(rows, num_keys):
  return Workload(
    op="top_k",
    shape=f"{rows}x{num_keys}",
    make=lambda key: (_normal(key, (rows, num_keys), jnp.float32),),
    function=functools.partial(topk.top_k, k=_K),
    expected=lambda scores: pallas_kernels.top_k(
      scores[:_FEW], _K, implementation="xla"
    ),
    few=lambda indices: indices[:_FEW],
    tolerance=0,
  )


def _indexer_scores(batch, queries, num_keys, heads, dtype):
  def make(key):
    keys = jax.random.split(key, 3)
    return (
      _normal(keys[0], (batch, queries, heads, 128), dtype),
      _normal(keys[1], (batch, num_keys, 128), dtype),
      _normal(keys[2], (batch, queries, heads), jnp.float32),
      *_causal_bounds(batch, queries, num_keys),
    )

  def expected(index_q, index_k, *others):
    index_q, index_k = _widened(_last(index_q), index_k)
    return pallas_kernels.indexer_scores(
      index_q, index_k, *map(_last, others), implementation="xla"
    )

  is_float8 = dtype == jnp.float8_e4m3fn
  return Workload(
    op="indexer_scores",
    shape=f"{batch}x{queries}x{num_keys} {heads} heads"
    f" {'fp8' if is_float8 else 'bf16'}",
    make=make,
    function=indexer.indexer_scores,
    expected=expected,
    few=_last,
    # The matrix units sum 8-bit products to some 14 bits.
    tolerance=5e-4 if is_float8 else 1e-5,
  )


def _dense_mla_residuals(queries, num_keys, heads):
  def make(key):
    keys = jax.random.split(key)
    return (
      _normal(keys[0], (1, queries, heads, 576)),
      _normal(keys[1], (1, num_keys, 576)),
      *_causal_bounds(1, queries, num_keys),
    )

  def expected(query, latent, *bounds):
    query, latent = _widened(_last(query), latent)
    return pallas_kernels.dense_mla_residuals(
      query, latent, *map(_last, bounds), scale=_SCALE, implementation="xla"
    )

  return Workload(
    op="dense_mla_residuals",
    shape=f"{queries}x{num_keys} {heads} heads",
    make=make,
    function=functools.partial(
      dense_attention.dense_mla_residuals, scale=_SCALE
    ),
    expected=expected,
    few=lambda out: jax.tree.map(_last, out),
    tolerance=1e-4,
  )


def _grouped_matmul(rows, groups, width, out_width):
  def make(key):
    keys = jax.random.split(key, 3)
    sizes = jax.random.multinomial(keys[2], rows, jnp.full(groups, 1 / groups))
    return (
      _normal(keys[0], (rows, width)),
      _normal(keys[1], (groups, width, out_width)),
      sizes.astype(jnp.int32),
    )

  def expected(rows, matrices, sizes):
    ends = jnp.minimum(jnp.cumsum(sizes), _FEW)
    return pallas_kernels.grouped_matmul(
      *_widened(rows[:_FEW], matrices),
      jnp.diff(ends, prepend=0),
      implementation="xla",
    )

  return Workload(
    op="grouped_matmul",
    shape=f"{rows} rows, {groups} of {width}x{out_width}",
    make=make,
    function=grouped.grouped_matmul,
    expected=expected,
    few=lambda out: out[:_FEW],
    tolerance=4e-3,
  )


def _variants(base, *changes: dict) -> tuple[NamedTuple, ...]:
  return (base, *(base._replace(**change) for change in changes))


def _samples(chunks):
  return {"sample_chunks": ((float("inf"), chunks),)}


_MANY_ROWS = _variants(
  topk.MANY_ROWS,
  {"num_threads": 128},
  {"num_threads": 512},
  {"chunks": 2, "drained_chunks": 1},
  {"drained_chunks": 4},
)
_MANY_QUERIES = _variants(
  indexer.MANY_QUERIES,
  {"members": 1},
  {"keys": 96},
  {"keys": 64},
  {"stages": 4},
)
_FEW_QUERIES = _variants(
  indexer.FEW_QUERIES, {"warpgroups": 2}, {"warpgroups": 3}, {"stages": 2}
)
_BF16, _FP8 = jnp.bfloat16, jnp.float8_e4m3fn
SWEEPS = (
  Sweep(_top_k(4096, 32768), _MANY_ROWS),
  Sweep(
    _top_k(1024, 131072),
    _variants(topk.MANY_ROWS, _samples(1), _samples(4), {"num_threads": 512}),
  ),
  Sweep(
    _top_k(8, 131072),
    _variants(
      topk.FEW_ROWS,
      {"num_threads": 256},
      {"min_segment": 16384},
      _samples(1),
    ),
  ),
  Sweep(_indexer_scores(1, 4096, 32768, 64, _BF16), _MANY_QUERIES),
  Sweep(_indexer_scores(1, 4096, 32768, 32, _FP8), _MANY_QUERIES),
  Sweep(_indexer_scores(8, 1, 131072, 32, _BF16), _FEW_QUERIES),
  Sweep(_indexer_scores(8, 1, 131072, 32, _FP8), _FEW_QUERIES),
  Sweep(
    _dense_mla_residuals(512, 32768, 64),
    _variants(
      dense_attention.TILES, {"members": 1}, {"segment": 16}, {"segment": 64}
    ),
  ),
  Sweep(
    _grouped_matmul(16384, 64, 2048, 1536),
    _variants(
      grouped.TILES,
      {"block_m": 64},
      {"block_k": 128, "max_concurrent_steps": 3},
      {"grid_block_n": 2},
      {"grid_block_n": 12},
    ),
  ),
)


def main(argv):
  """Checks, times, prints a table and writes it."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  chosen = choose(_OPS.value)
  kernel_timing.require_gpu("sweep_tiles")
  source = {
    **common.environment(),
    "command": provenance.command(),
    "date": datetime.date.today().isoformat(),
  }
  path = pathlib.Path(_OUTPUT_DIR.value) / "tiles.jsonl"
  records = []
  for sweep in chosen:
    for record in bench(sweep):
      records.append({**record, **source})
      print(common.table_row(record, _COLUMNS), flush=True)
    common.write_records(path, records, _COLUMNS)


def choose(ops: list[str]) -> list[Sweep]:
  """Sweeps that the flag asks for."""
  known = sorted({sweep.workload.op for sweep in SWEEPS})
  unknown = [op for op in ops if op not in known]
  if unknown:
    raise ValueError(f"`--ops` must be among {known}: got {unknown}.")
  return [sweep for sweep in SWEEPS if not ops or sweep.workload.op in ops]


def bench(sweep: Sweep) -> Iterable[dict]:
  """Records of a sweep's variants."""
  workload, variants = sweep
  args = workload.make(jax.random.key(0))
  expected = jax.jit(workload.expected)(*args)
  chosen_ms = None
  for tiles in variants:
    measured = measure(workload, tiles, args, expected)
    if tiles == variants[0]:
      chosen_ms = measured.get("ms")
    if chosen_ms and "ms" in measured:
      measured["ratio"] = measured["ms"] / chosen_ms
    yield {
      "op": workload.op,
      "shape": workload.shape,
      "tiles": " ".join(f"{name}={x}" for name, x in tiles._asdict().items()),
      "chosen": tiles == variants[0],
      **measured,
    }


def measure(workload: Workload, tiles, args, expected) -> dict:
  """Error and time of a variant, or its fault."""
  function = functools.partial(workload.function, tiles=tiles)
  try:
    found = workload.few(jax.jit(function)(*args))
    error = relative_error(found, expected)
    if not error <= workload.tolerance:
      return {"error": error, "fault": f"error above {workload.tolerance}"}
    ms = kernel_timing.isolated_ms(function, *args, repeats=_REPEATS.value)
  except Exception as fault:
    # Tiles that do not compile are a result; the others are still wanted.
    return {"fault": f"{type(fault).__name__}: {fault}"[:300]}
  return {"error": error, "ms": ms}


def relative_error(found, expected) -> float:
  """The largest of all arrays', in the Frobenius norm; -inf must be -inf."""

  def error(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
      return np.inf
    a, b = (np.where(np.isfinite(x), x, 0) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)

  return float(max(jax.tree.leaves(jax.tree.map(error, found, expected))))


if __name__ == "__main__":
  common.run(main)
