# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Times prefill and generation of a whole model under reuse schedules.

Claim (IndexCache, arXiv 2603.12201, table 1, a 30B model on H100s): at 200K
tokens, a quarter of the indexers gives 1.82x the time to first token and 1.48x
the speed of generation.

  python -m experiments.profile_layer --output_dir=runs/inference
  python -m experiments.bench_inference --profile=runs/inference/profile.jsonl

Random weights; the work does not depend on their values, once the experts share
the tokens as a trained router's do: their load is reported. Beside each ratio
stands what kernels account for: the speed-up if the time of the removed
indexers' kernels alone went away. Each time has the card's mean clock and power
beside it: the power limit holds the clock down, and not alike for all phases.
"""

import datetime
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

import indexcache_jax as ic
from experiments import (
  common,
  gpu_clock,
  inference_programs,
  inference_report,
  inference_series,
  provenance,
  random_model,
)
from indexcache_jax import costs, generation, presets

_PRESET = flags.DEFINE_enum(
  "preset", "glm_47_flash_dsa", sorted(presets.PRESETS), "The model."
)
_LAYERS = flags.DEFINE_integer(
  "num_layers", None, "Only so many layers; default: all.", lower_bound=1
)
_CONTEXTS = flags.DEFINE_list(
  "contexts", ["10000", "60000", "120000", "200000"], "Tokens of the prompt."
)
_SCHEDULES = flags.DEFINE_list(
  "schedules",
  ["full", "1/2", "1/4", "1/8"],
  "full, the paper's searched 1/2, 1/4 and 1/8 of 47 layers, or what"
  " --schedule of the other scripts takes.",
)
_KEY_DTYPES = flags.DEFINE_list(
  "index_key_dtypes",
  ["bfloat16"],
  "Dtypes of the index keys, each a series of its own: bfloat16 (the model's"
  " dtype), float8_e4m3fn.",
)
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size", 10000, "Tokens of a prefill chunk.", lower_bound=1
)
_NEW_TOKENS = flags.DEFINE_integer(
  "new_tokens", 64, "Generated tokens that are timed.", lower_bound=1
)
_BATCH_CONTEXTS = flags.DEFINE_list(
  "batch_contexts", [], "Also generate for as many requests as fit, at these."
)
_MAX_BATCH = flags.DEFINE_integer(
  "max_batch", 256, "Requests at most.", lower_bound=1
)
_PHASES = flags.DEFINE_multi_enum(
  "phases",
  ["prefill", "decode"],
  ["prefill", "decode"],
  "What to measure; repeat the flag for several.",
)
_PROFILE = flags.DEFINE_string(
  "profile",
  None,
  "profile.jsonl of profile_layer, for what kernels account for.",
)
_JOBS = flags.DEFINE_integer(
  "compile_jobs", 1, "Programs compiled at the same time.", lower_bound=1
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/inference", "Where inference.jsonl, .md and .png go."
)

# Bytes that caches leave free for activations and what XLA compiles.
_ACTIVATION_BYTES = 6 << 30
# Of the device, for JAX's arrays: its default of 0.75 would bound the largest
# batch. The rest holds CUDA's context, its graphs and cuBLAS's workspaces.
_MEMORY_FRACTION = "0.92"


def main(argv):
  """Measures what the flags ask for; a record a number."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", _MEMORY_FRACTION)
  config = presets.PRESETS[_PRESET.value]()
  if _LAYERS.value:
    config = config.replace(
      num_hidden_layers=_LAYERS.value,
      schedule=ic.ReuseSchedule.all_full(_LAYERS.value),
    )
  contexts = sorted(map(int, _CONTEXTS.value))
  folder = pathlib.Path(_OUTPUT_DIR.value)
  log = Log(folder / "inference.jsonl")
  series = [
    inference_series.series(config, name, key_dtype)
    for key_dtype in _KEY_DTYPES.value
    for name in _SCHEDULES.value
  ]
  profile = inference_report.read_profile(_PROFILE.value)
  params = make_params(config, log)
  compile_all(series, params, contexts, log)
  with gpu_clock.ClockLog() as clock:
    for one in series:
      Bench(one, params, log, clock).run(contexts)
      inference_report.write(folder, log.records, profile)
  print(inference_report.table(log.records, profile))
  print(f"\n{inference_report.indexer_table(log.records)}")


def make_params(config, log: "Log") -> dict:
  """Random parameters of the all-full model, for every schedule."""
  begin = time.perf_counter()
  params = jax.block_until_ready(random_model.random_params(config))
  log.add(
    metric="parameters",
    bytes=sum(x.nbytes for x in jax.tree.leaves(params)),
    seconds=time.perf_counter() - begin,
  )
  if config.n_routed_experts:
    begin = time.perf_counter()
    params, loads = random_model.balance_experts(
      config, params, num_tokens=min(_CHUNK_SIZE.value, 4096)
    )
    log.add(
      metric="expert_load_over_mean",
      mean=float(loads.mean()),
      max=float(loads.max()),
      seconds=time.perf_counter() - begin,
    )
  return params


def compile_all(series, params, contexts, log: "Log") -> None:
  """Compiles each series' programs, some at a time, into JAX's cache."""
  if _JOBS.value == 1:
    return
  begin = time.perf_counter()
  faults = common.compile_into_cache(
    (
      program
      for one in series
      for program in lower_programs(one.config, params, contexts)
    ),
    _JOBS.value,
  )
  for fault in filter(None, faults):
    raise fault
  log.add(
    metric="compile_all",
    programs=len(faults),
    jobs=_JOBS.value,
    seconds=time.perf_counter() - begin,
  )


def lower_programs(config, params, contexts) -> Iterator:
  """A chunk of prefill, and a block of decoding for each number of requests."""
  capacity = cache_capacity(contexts)
  if "prefill" in _PHASES.value:
    yield inference_programs.lower_prefill(
      config, params, _CHUNK_SIZE.value, capacity
    )
  if "decode" in _PHASES.value:
    sizes = [(1, capacity)]
    sizes += [
      (requests.count, requests.capacity)
      for requests in batches(config, params)
    ]
    for size in sizes:
      yield inference_programs.lower_decoding(config, params, *size)


class Requests(NamedTuple):
  """Requests of one length, decoded together.

  Attributes:
    context: tokens of each.
    count: of the requests.
    capacity: of each cache.
  """

  context: int
  count: int
  capacity: int


def batches(config, params) -> list[Requests]:
  """As many requests as fit at each of --batch_contexts, where any does."""
  token_bytes = costs.schedule_costs(config, context=1).cache_bytes
  found = []
  for context in sorted(map(int, _BATCH_CONTEXTS.value)):
    capacity = context + 2 * _NEW_TOKENS.value
    fits = free_bytes(params) // (token_bytes * capacity)
    if fits:
      count = int(min(_MAX_BATCH.value, fits))
      found.append(Requests(context, count, capacity))
  return found


def free_bytes(params) -> int:
  """Bytes for caches beside the parameters and a chunk's activations."""
  stats = jax.devices()[0].memory_stats() or {}
  held = sum(x.nbytes for x in jax.tree.leaves(params))
  return max(stats.get("bytes_limit", 0) - held - _ACTIVATION_BYTES, 0)


def cache_capacity(contexts: list[int]) -> int:
  """Tokens of the cache: the longest prompt, what is generated, in chunks."""
  chunk = _CHUNK_SIZE.value
  return -(-(contexts[-1] + 2 * _NEW_TOKENS.value) // chunk) * chunk


class Log:
  """Records with their source, on the disk as soon as they are known."""

  def __init__(self, path: pathlib.Path):
    """Starts a file."""
    self._path = path
    self._source = {
      **common.environment(),
      "command": provenance.command(),
      "preset": _PRESET.value,
      "num_layers": _LAYERS.value,
      "chunk_size": _CHUNK_SIZE.value,
      "date": datetime.date.today().isoformat(),
    }
    self.records = []

  def add(self, **record) -> None:
    """Adds a record, prints it and writes all."""
    self.records.append(record)
    print(
      " ".join(
        f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in record.items()
      ),
      flush=True,
    )
    lines = [json.dumps({**r, **self._source}) for r in self.records]
    common.write_text(self._path, "\n".join(lines) + "\n")


class Bench:
  """A model under one schedule, with its two compiled programs."""

  def __init__(
    self,
    series: inference_series.Series,
    params,
    log: Log,
    clock: gpu_clock.ClockLog,
  ):
    """Keeps what the runs share."""
    self._config = series.config
    self._labels = series.labels
    self._params = params
    self._model = ic.SparseTransformer(series.config)
    self._log = log
    self._clock = clock

  def run(self, contexts: list[int]) -> None:
    """Prefills and generates at each context, longest last."""
    config, chunk = self._config, _CHUNK_SIZE.value
    capacity = cache_capacity(contexts)
    if "prefill" in _PHASES.value:
      cache = ic.init_cache(config, 1, capacity)
    else:
      cache = random_model.random_cache(config, 1, capacity, contexts[-1])
    token_bytes = costs.schedule_costs(config, context=1).cache_bytes
    self._add(
      "cache",
      bytes=cache.num_bytes,
      capacity=cache.capacity,
      bytes_per_token=cache.num_bytes / cache.capacity,
      computed_bytes_per_token=token_bytes,
      longest_context=free_bytes(self._params) // token_bytes,
    )
    logits = None
    if "prefill" in _PHASES.value:
      begin = time.perf_counter()
      # Two chunks: what joins their results is compiled too.
      _, cache = self._prefill(cache, min(2 * chunk, contexts[-1]))
      self._add("prefill_compile", seconds=time.perf_counter() - begin)
      for context in contexts:
        begin = time.perf_counter()
        logits, cache = self._prefill(cache, context)
        self._add(
          "prefill",
          context=context,
          seconds=time.perf_counter() - begin,
          **self._clock.since(begin),
        )
    if "decode" in _PHASES.value:
      if logits is None:
        logits = jnp.zeros((1, config.vocab_size), jnp.float32)
      self._decode_all(contexts, logits, cache)
      del cache
      self._decode_batches()
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
      self._add("peak", bytes=stats["peak_bytes_in_use"])

  def _prefill(self, cache, context):
    """Time to first token is that of all chunks."""
    rng = np.random.default_rng(context)
    tokens = rng.integers(0, self._config.vocab_size, (1, context), np.int32)
    result = generation.prefill(
      self._model,
      self._params,
      tokens,
      np.array([context]),
      cache.replace(lengths=jnp.zeros_like(cache.lengths)),
      chunk_size=_CHUNK_SIZE.value,
    )
    return jax.block_until_ready(result)

  def _decode_all(self, contexts, logits, cache):
    """The rows before a context are there: only its length is set back."""
    for place, context in enumerate(contexts):
      lengths = jnp.full_like(cache.lengths, context)
      batch = int(lengths.shape[0])
      state = generation.DecodeState(
        logits,
        cache.replace(lengths=lengths),
        jnp.zeros(lengths.shape, bool),
        jnp.int32(0),
      )
      begin = time.perf_counter()
      state = self._decode(state, 1)
      if place == 0:
        self._add(
          "decode_compile", batch=batch, seconds=time.perf_counter() - begin
        )
      # As long as what is measured: a program's first calls are slower.
      state = self._decode(state, _NEW_TOKENS.value - 1)
      begin = time.perf_counter()
      state = self._decode(state, _NEW_TOKENS.value)
      seconds = time.perf_counter() - begin
      self._add(
        "decode",
        context=context,
        batch=batch,
        ms_per_token=seconds / _NEW_TOKENS.value * 1e3,
        tokens_per_second=batch * _NEW_TOKENS.value / seconds,
        **self._clock.since(begin),
      )
      logits, cache = state.logits, state.cache

  def _decode(self, state, num_tokens):
    """Generates; the loop runs on the device, 32 tokens a call."""
    no_stop = jnp.zeros((0,), jnp.int32)
    while num_tokens > 0:
      limit = min(num_tokens, 32)
      state, _ = generation.decode_block(
        self._model,
        self._params,
        state,
        jax.random.key(0),
        None,
        no_stop,
        jnp.int32(limit),
      )
      num_tokens -= limit
    return jax.block_until_ready(state)

  def _decode_batches(self):
    """As many requests as fit, each with a cache of its own."""
    config = self._config
    for requests in batches(config, self._params):
      cache = random_model.random_cache(
        config, requests.count, requests.capacity, requests.context
      )
      logits = jnp.zeros((requests.count, config.vocab_size), jnp.float32)
      self._decode_all([requests.context], logits, cache)

  def _add(self, metric, **record):
    self._log.add(**self._labels, metric=metric, **record)


if __name__ == "__main__":
  common.run(main)
