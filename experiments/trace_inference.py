# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the wall time of a token and of a prefill chunk goes, kernels in place.

  XLA_FLAGS=--xla_enable_command_buffers_during_profiling=true \
    python -m experiments.trace_inference --num_layers=12

`profile_layer` times a layer by itself; this runs the programs that
`bench_inference` runs, of some of a model's layers, and traces them: what XLA
adds around a layer (a copy of a cache, say), gaps between kernels, and all
kernels at the clock that the load leaves. `trace.jsonl` has a line a program:
the wall time untraced, and of the trace the time in which anything runs, the
number of kernels, and the longest by name.
"""

import datetime
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

import indexcache_jax as ic
from experiments import (
  common,
  device_trace,
  gpu_clock,
  inference_programs,
  inference_series,
  kernel_timing,
  provenance,
  random_model,
)
from indexcache_jax import generation, presets

_PRESET = flags.DEFINE_enum(
  "preset", "glm_47_flash_dsa", sorted(presets.PRESETS), "Whose layers."
)
_LAYERS = flags.DEFINE_integer("num_layers", 12, "Of the model.", lower_bound=1)
_SCHEDULES = flags.DEFINE_list(
  "schedules",
  ["full", "freq:1000:1"],
  "Schedules: the default has one indexer.",
)
_KEY_DTYPES = flags.DEFINE_list(
  "index_key_dtypes",
  ["bfloat16"],
  "Dtypes of the index keys: bfloat16 (the model's dtype), float8_e4m3fn.",
)
_CONTEXT = flags.DEFINE_integer(
  "context", 200000, "Tokens before what is traced ends.", lower_bound=1
)
_CAPACITY = flags.DEFINE_integer(
  "capacity", 210000, "Tokens of the cache.", lower_bound=1
)
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size", 10000, "Tokens of a prefill chunk.", lower_bound=1
)
_JOBS = flags.DEFINE_integer(
  "compile_jobs", 1, "Programs compiled at the same time.", lower_bound=1
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/trace", "Where trace.jsonl goes."
)

# Tokens, and chunks, of a timed call; of a traced one, whose events are many.
_TIMED = {"decode": 32, "prefill": 8}
_TRACED = {"decode": 8, "prefill": 2}
_REPEATS = 5
_NUM_LONGEST = 24
_COLUMNS = (
  *("phase", "schedule", "num_full", "index_keys"),
  *("wall_ms", "busy_ms", "kernels", "sm_mhz", "watts"),
)


def main(argv):
  """Traces every combination and prints a table."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  kernel_timing.require_gpu("trace_inference")
  device_trace.require_flag()
  _check_lengths()
  layers = _LAYERS.value
  config = presets.PRESETS[_PRESET.value]().replace(
    num_hidden_layers=layers, schedule=ic.ReuseSchedule.all_full(layers)
  )
  series = [
    inference_series.series(config, name, key_dtype)
    for key_dtype in _KEY_DTYPES.value
    for name in _SCHEDULES.value
  ]
  params = jax.block_until_ready(random_model.random_params(config))
  if config.n_routed_experts:
    params, _ = random_model.balance_experts(
      config, params, num_tokens=min(_CHUNK_SIZE.value, 4096)
    )
  compile_all(series, params)
  source = {
    **common.environment(),
    "command": provenance.command(),
    "preset": _PRESET.value,
    "num_layers": layers,
    "context": _CONTEXT.value,
    "capacity": _CAPACITY.value,
    "chunk_size": _CHUNK_SIZE.value,
    "date": datetime.date.today().isoformat(),
  }
  path = pathlib.Path(_OUTPUT_DIR.value) / "trace.jsonl"
  records = []
  print(common.table_head(_COLUMNS))
  with gpu_clock.ClockLog() as clock:
    for one in series:
      for record in trace(one.config, params, clock):
        record = {**one.labels, **record}
        print(common.table_row(record, _COLUMNS), flush=True)
        records.append({**record, **source})
        common.write_records(path, records, _COLUMNS)


def _check_lengths():
  context, capacity = _CONTEXT.value, _CAPACITY.value
  # Decoding starts behind the context and goes on through every repetition.
  needed = context + (_REPEATS + 1) * _TIMED["decode"] + _TRACED["decode"]
  if capacity < needed:
    raise ValueError(
      "`--capacity` must hold the context and the tokens that follow,"
      f" {needed}: got {capacity}. Raise it, or shorten `--context`."
    )
  if _CHUNK_SIZE.value > context:
    raise ValueError(
      f"`--chunk_size` must be at most `--context`, {context}: got"
      f" {_CHUNK_SIZE.value}."
    )


def compile_all(series, params) -> None:
  """Compiles all programs into JAX's cache, where there is one."""
  if _JOBS.value == 1:
    return
  programs = (
    program
    for one in series
    for program in (
      inference_programs.lower_decoding(one.config, params, 1, _CAPACITY.value),
      inference_programs.lower_prefill(
        one.config, params, _CHUNK_SIZE.value, _CAPACITY.value
      ),
    )
  )
  for fault in filter(None, common.compile_into_cache(programs, _JOBS.value)):
    raise fault


def trace(config, params, clock: gpu_clock.ClockLog):
  """Yields the record of a token, then that of a chunk."""
  cache = random_model.random_cache(config, 1, _CAPACITY.value, _CONTEXT.value)
  decoding = _Decoding(config, params, cache)
  yield measure("decode", decoding.run, clock)
  chunks = _Chunks(config, params, decoding.state.cache)
  yield measure("prefill", chunks.run, clock)


class _Decoding:
  """Tokens behind the context, one block after another."""

  def __init__(self, config, params, cache: ic.Cache):
    self._model = ic.SparseTransformer(config)
    self._params = params
    self.state = generation.DecodeState(
      jnp.zeros((1, config.vocab_size), jnp.float32),
      cache,
      jnp.zeros((1,), bool),
      jnp.int32(0),
    )

  def run(self, count):
    self.state, *_ = generation.decode_block(
      self._model,
      self._params,
      self.state,
      jax.random.key(0),
      None,
      jnp.zeros((0,), jnp.int32),
      jnp.int32(count),
    )
    jax.block_until_ready(self.state)


class _Chunks:
  """The context's last chunk, of random tokens, again and again."""

  def __init__(self, config, params, cache: ic.Cache):
    self._model = ic.SparseTransformer(config)
    self._params = params
    self._cache = cache
    size = _CHUNK_SIZE.value
    # One token in all places would keep the card's clock higher.
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, size))
    self._tokens = jnp.asarray(tokens, jnp.int32)

  def run(self, count):
    size = _CHUNK_SIZE.value
    for _ in range(count):
      # The program takes over the memory of all that the cache holds.
      start = jnp.full((1,), _CONTEXT.value - size, jnp.int32)
      _, self._cache = generation.extend(
        self._model,
        self._params,
        self._tokens,
        jnp.full((1,), size, jnp.int32),
        self._cache.replace(lengths=start),
      )
    jax.block_until_ready(self._cache)


def measure(phase, run, clock: gpu_clock.ClockLog) -> dict:
  """Times `run`, of a number of tokens or chunks, then traces it."""
  timed, traced = _TIMED[phase], _TRACED[phase]
  run(timed)
  begin = time.perf_counter()
  walls = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    run(timed)
    walls.append((time.perf_counter() - start) / timed * 1e3)
  rates = clock.since(begin)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run(traced)
    events = device_trace.read(pathlib.Path(folder))
  return {
    "phase": phase,
    "wall_ms": statistics.median(walls),
    **rates,
    **summarize(events, traced),
  }


def summarize(events: list[device_trace.Event], count: int) -> dict:
  """Of `count` tokens or chunks: for one, in milliseconds."""
  return {
    "busy_ms": device_trace.busy_ns(events) / count / 1e6,
    "kernels": len(events) / count,
    "longest": [
      {
        "name": total.name,
        "count": total.count / count,
        "ms": total.duration_ns / count / 1e6,
      }
      for total in device_trace.totals(events)[:_NUM_LONGEST]
    ],
  }


if __name__ == "__main__":
  common.run(main)
