# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Times prefill and generation of a whole model under reuse schedules.

Claim (IndexCache, arXiv 2603.12201, table 1, a 30B model on H100s): at 200K
tokens, a quarter of the indexers gives 1.82x the time to first token and 1.48x
the speed of generation.

  python -m experiments.bench_inference --contexts=10000,60000,120000,200000

Random weights; the work does not depend on their values, and the load of the
experts is reported. Beside each ratio stands the most that Amdahl's law allows
for the indexer's share, which is measured apart, on one layer.
"""

import datetime
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

import indexcache_jax as ic
from experiments import common, random_model
from indexcache_jax import generation, op_times, presets

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
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size", 5000, "Tokens of a prefill chunk.", lower_bound=1
)
_NEW_TOKENS = flags.DEFINE_integer(
  "new_tokens", 64, "Generated tokens that are timed.", lower_bound=1
)
_MAX_BATCH = flags.DEFINE_integer(
  "max_batch", 0, "Also generate for as many requests as fit, at most these."
)
_PHASES = flags.DEFINE_list(
  "phases", ["prefill", "decode", "shares"], "What to measure."
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/inference", "Where inference.jsonl goes."
)

# Appendix B of the paper.
PAPER_PATTERNS = {
  "1/2": "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF",
  "1/4": "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS",
  "1/8": "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS",
}
# Bytes that a batch of caches leaves free for activations.
_ACTIVATION_BYTES = 6 << 30


def main(argv):
  """Measures what the flags ask for; a record a number."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  config = presets.PRESETS[_PRESET.value]()
  if _LAYERS.value:
    config = config.replace(
      num_hidden_layers=_LAYERS.value,
      schedule=ic.ReuseSchedule.all_full(_LAYERS.value),
    )
  contexts = sorted(map(int, _CONTEXTS.value))
  schedules = {
    name: parse_schedule(name, config.num_hidden_layers)
    for name in _SCHEDULES.value
  }
  log = Log(pathlib.Path(_OUTPUT_DIR.value) / "inference.jsonl")
  if "shares" in _PHASES.value:
    for context in contexts:
      measure_shares(config, context, log)
  begin = time.perf_counter()
  params = jax.block_until_ready(random_model.random_params(config))
  log.add(
    metric="parameters",
    bytes=sum(x.nbytes for x in jax.tree.leaves(params)),
    seconds=time.perf_counter() - begin,
  )
  if config.n_routed_experts:
    loads = random_model.expert_loads(config, params)
    log.add(
      metric="expert_load_over_mean",
      mean=float(loads.mean()),
      max=float(loads.max()),
    )
  for name, schedule in schedules.items():
    bench = Bench(config.replace(schedule=schedule), params, name, log)
    bench.run(contexts)
  print(summary(log.records))


def parse_schedule(name: str, num_layers: int) -> ic.ReuseSchedule:
  """The paper's pattern of that name, or any notation."""
  pattern = PAPER_PATTERNS.get(name)
  if pattern is None:
    return ic.ReuseSchedule.parse(name, num_layers)
  if len(pattern) != num_layers:
    raise ValueError(
      f"`--schedules={name}` is the paper's pattern of {len(pattern)} layers:"
      f" got a model of {num_layers}. Give a pattern, uniform:N or freq:N."
    )
  return ic.ReuseSchedule.from_pattern(pattern)


class Log:
  """Records with their provenance, on the disk as soon as they are known."""

  def __init__(self, path: pathlib.Path):
    """Starts a file."""
    self._path = path
    self._provenance = {
      **common.environment(),
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
    lines = [json.dumps({**r, **self._provenance}) for r in self.records]
    common.write_text(self._path, "\n".join(lines) + "\n")


def measure_shares(config, context: int, log: Log) -> None:
  """One layer's op times at the end of a prompt, in prefill and decode."""
  for phase, num_tokens in (
    ("prefill", min(_CHUNK_SIZE.value, context)),
    ("decode", 1),
  ):
    times = op_times.measure_op_times(
      config, num_tokens=num_tokens, context=context
    )
    log.add(
      metric="op_times",
      phase=phase,
      context=context,
      num_tokens=num_tokens,
      indexer_ms=times.indexer * 1e3,
      attention_ms=times.attention * 1e3,
      rest_ms=times.rest * 1e3,
      constant_ms=times.constant * 1e3,
    )


class Bench:
  """A model under one schedule, with its two compiled programs."""

  def __init__(self, config, params, name: str, log: Log):
    """Keeps what the runs share."""
    self._config = config
    self._params = params
    self._model = ic.SparseTransformer(config)
    self._name = name
    self._log = log

  def run(self, contexts: list[int]) -> None:
    """Prefills and generates at each context, longest last."""
    config, chunk = self._config, _CHUNK_SIZE.value
    capacity = -(-(contexts[-1] + 2 * _NEW_TOKENS.value) // chunk) * chunk
    cache = ic.init_cache(config, 1, capacity)
    self._add("cache", bytes=cache.num_bytes, capacity=capacity)
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
          "prefill", context=context, seconds=time.perf_counter() - begin
        )
    else:
      cache = random_model.random_cache(cache, contexts[-1])
    if "decode" in _PHASES.value:
      if logits is None:
        logits = jnp.zeros((1, config.vocab_size), jnp.float32)
      self._decode_all(contexts, logits, cache)
      del cache
      if _MAX_BATCH.value:
        self._decode_batches(contexts)
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
      state = generation.DecodeState(
        logits,
        cache.replace(lengths=lengths),
        jnp.zeros(lengths.shape, bool),
        jnp.int32(0),
      )
      begin = time.perf_counter()
      state = self._decode(state, 1)
      if place == 0:
        self._add("decode_compile", seconds=time.perf_counter() - begin)
      begin = time.perf_counter()
      state = self._decode(state, _NEW_TOKENS.value)
      seconds = time.perf_counter() - begin
      self._add(
        "decode",
        context=context,
        batch=int(lengths.shape[0]),
        ms_per_token=seconds / _NEW_TOKENS.value * 1e3,
        tokens_per_second=lengths.shape[0] * _NEW_TOKENS.value / seconds,
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

  def _decode_batches(self, contexts):
    """As many requests as fit, each with a cache of its own."""
    config = self._config
    stats = jax.devices()[0].memory_stats() or {}
    for context in contexts:
      one = jax.eval_shape(
        lambda c=context: ic.init_cache(config, 1, c + 2 * _NEW_TOKENS.value)
      )
      size = sum(
        x.size * x.dtype.itemsize for x in (*one.kv_latent, *one.index_keys)
      )
      free = stats.get("bytes_limit", 0) - sum(
        x.nbytes for x in jax.tree.leaves(self._params)
      )
      batch = int(min(_MAX_BATCH.value, (free - _ACTIVATION_BYTES) // size))
      if batch < 1:
        continue
      cache = ic.init_cache(config, batch, context + 2 * _NEW_TOKENS.value)
      cache = random_model.random_cache(cache, context)
      logits = jnp.zeros((batch, config.vocab_size), jnp.float32)
      self._decode_all([context], logits, cache)

  def _add(self, metric, **record):
    self._log.add(
      schedule=self._name,
      num_full=self._config.schedule.num_full,
      metric=metric,
      **record,
    )


def summary(records: list[dict]) -> str:
  """Ratios to the all-full schedule, with Amdahl's limit for each."""
  lines = []
  for metric, value in (("prefill", "seconds"), ("decode", "ms_per_token")):
    times = {
      (r["schedule"], r["context"]): (r[value], r["num_full"])
      for r in records
      if r["metric"] == metric and r.get("batch", 1) == 1
    }
    for (name, context), (taken, num_full) in times.items():
      base = times.get(("full", context))
      if base is None:
        continue
      limit = amdahl_limit(records, metric, context, base, num_full)
      lines.append(
        f"| {metric} | {context} | {name} | {taken:.4g} {value} |"
        f" {base[0] / taken:.3g}x | {limit:.3g}x |"
      )
  head = "| phase | context | schedule | time | speed-up | Amdahl's limit |"
  return "\n".join([head, "|---|---|---|---|---|---|", *lines])


def amdahl_limit(records, metric, context, base, num_full) -> float:
  """The speed-up if the removed indexers' time alone went away.

  An indexer's time in a chunk grows with its position, so a prefill's is the
  integral over the positions that were measured.
  """
  points = sorted(
    (r["context"], r["indexer_ms"], r["num_tokens"])
    for r in records
    if r["metric"] == "op_times" and r["phase"] == metric
  )
  seconds, layers = base
  if not points:
    return float("nan")
  places, times, num_tokens = map(np.array, zip(*points, strict=True))
  if metric == "decode":
    indexer = np.interp(context, places, times)
  else:
    chunk = _CHUNK_SIZE.value
    ends = np.arange(chunk, context + 1, chunk)
    per_token = times / num_tokens * chunk
    indexer = np.interp(ends, [0, *places], [0, *per_token]).sum() / 1e3
  return float(seconds / (seconds - (layers - num_full) * indexer))


if __name__ == "__main__":
  common.run(main)
