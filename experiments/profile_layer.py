# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a layer's time goes: each kind of kernel, its floor and its share.

  python -m experiments.profile_layer --contexts=10000,60000,120000,200000

One layer of experts with a cache, full and shared, at the end of a prompt: a
prefill chunk, and one token. Times are the driver's, of each kernel; a floor is
the larger of operations at the card's matrix rate and bytes at its bandwidth,
both measured in the same run. `profile.jsonl` also holds the longest kernels of
each layer by name.
"""

import collections
import concurrent.futures
import dataclasses
import datetime
import itertools
import pathlib

import jax
import jax.numpy as jnp
from absl import flags, logging

import indexcache_jax as ic
import pallas_kernels
from experiments import common, kernel_timing, provenance, random_model
from indexcache_jax import attention, costs, decoder, presets
from pallas_kernels.expert_mlp import mosaic_gpu_few_rows as few_rows

_PRESET = flags.DEFINE_enum(
  "preset", "glm_47_flash_dsa", sorted(presets.PRESETS), "Whose layer."
)
_CONTEXTS = flags.DEFINE_list(
  "contexts", ["10000", "60000", "120000", "200000"], "Keys."
)
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size", 10000, "Tokens of a prefill chunk.", lower_bound=1
)
_KEY_DTYPES = flags.DEFINE_list(
  "index_key_dtypes",
  ["bfloat16"],
  "Dtypes of the index keys: bfloat16 (the model's dtype), float8_e4m3fn.",
)
_PHASES = flags.DEFINE_multi_enum(
  "phases",
  ["prefill", "decode"],
  ["prefill", "decode"],
  "What to profile; repeat the flag for several.",
)
_JOBS = flags.DEFINE_integer(
  "compile_jobs", 1, "Programs compiled at the same time.", lower_bound=1
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/layer", "Where profile.jsonl goes."
)

# The first word that a kernel's name holds says what it does.
_KINDS = {
  "top_k": "selection",
  "indexer": "scores",
  "sparse_mla": "attention",
  "expert_mlp": "experts",
  # What JAX's grouped product calls its kernel.
  "body_mosaic_gpu": "experts",
}
_REST = "projections and rest"
_NUM_LONGEST = 12
_COLUMNS = (
  *("phase", "context", "layer", "index_keys", "kind"),
  *("ms", "floor_ms", "share"),
)


def main(argv):
  """Profiles every combination and prints a table."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  kernel_timing.require_gpu("profile_layer")
  config = presets.PRESETS[_PRESET.value]()
  config = config.replace(
    num_hidden_layers=1,
    first_k_dense_replace=0,
    schedule=ic.ReuseSchedule.all_full(1),
  )
  rates = Rates(
    {
      name: kernel_timing.matmul_ceiling(name)["sustained"] * 1e12
      for name in {"bfloat16", *_KEY_DTYPES.value}
    },
    kernel_timing.copy_ceiling()["isolated"] * 1e12,
  )
  source = {
    **common.environment(),
    "command": provenance.command(),
    "preset": _PRESET.value,
    "flops": rates.flops,
    "bandwidth": rates.bandwidth,
    "date": datetime.date.today().isoformat(),
  }
  params = random_model.random_params(config)["layers_0"]
  cases = list(all_cases(config))
  kernels = dict(zip(cases, profile_all(cases, params), strict=True))
  records = []
  print(common.table_head(_COLUMNS))
  path = pathlib.Path(_OUTPUT_DIR.value) / "profile.jsonl"
  for case, keys in itertools.product(cases, _KEY_DTYPES.value):
    # A shared layer has no index keys: one profile stands beside each dtype.
    if case.is_full and case.key_dtype != keys:
      continue
    for record in summarize(case, kernels[case], rates):
      record = {
        "phase": "decode" if case.tokens == 1 else "prefill",
        "context": case.context,
        "layer": "full" if case.is_full else "shared",
        "index_keys": keys,
        "tokens": case.tokens,
        **record,
      }
      records.append({**record, **source})
      print(common.table_row(record, _COLUMNS), flush=True)
    common.write_records(path, records, _COLUMNS)


@dataclasses.dataclass(frozen=True)
class Case:
  """A call of a layer.

  Attributes:
    config: of a model of one layer.
    is_full: whether the layer runs its indexer.
    tokens: queries, the last of the context.
    context: keys.
  """

  config: ic.SparseTransformerConfig
  is_full: bool
  tokens: int
  context: int

  @property
  def key_dtype(self) -> str:
    """Of the index keys."""
    return jnp.dtype(self.config.index_key_dtype or self.config.dtype).name


def all_cases(config):
  """Every context, phase and kind of layer; full ones for every key dtype."""
  tokens_of = {"prefill": _CHUNK_SIZE.value, "decode": 1}
  phases = [tokens_of[phase] for phase in _PHASES.value]
  for context, tokens in itertools.product(map(int, _CONTEXTS.value), phases):
    for keys in _KEY_DTYPES.value:
      chosen = config.replace(
        index_key_dtype=jnp.float8_e4m3fn if keys == "float8_e4m3fn" else None
      )
      yield Case(chosen, True, tokens, context)
    yield Case(config, False, tokens, context)


class Rates:
  """Operations and bytes a second of the card."""

  def __init__(self, flops: dict[str, float], bandwidth: float):
    """Keeps what was measured."""
    self.flops = flops
    self.bandwidth = bandwidth

  def floor_ms(self, dtype: str, flops: float, num_bytes: float) -> float:
    """The least time of that much work in `dtype`."""
    return max(flops / self.flops[dtype], num_bytes / self.bandwidth) * 1e3


def profile_all(cases, params) -> list[list[tuple[str, float]]]:
  """Name and milliseconds of each kernel in one call of every case.

  All are compiled before the first is timed: XLA times candidates on the card
  as it compiles.
  """

  def compile_case(case):
    arguments = jax.eval_shape(lambda: make_arguments(case))
    return jax.jit(layer_function(case)).lower(params, *arguments).compile()

  with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
    programs = list(pool.map(compile_case, cases))
  return [
    kernel_timing.kernel_times(program, params, *make_arguments(case))
    for case, program in zip(cases, programs, strict=True)
  ]


def layer_function(case: Case):
  """The call: of parameters and `make_arguments`."""
  module = decoder.DecoderLayer(case.config, use_experts=True)
  attended = attention.make_context(
    case.config,
    jnp.zeros((1, case.tokens), jnp.int32),
    cache_lengths=jnp.full((1,), case.context - case.tokens, jnp.int32),
  )

  def run(params, hidden, cache, index):
    out, index, cache, _ = module.apply(
      {"params": params}, hidden, attended, index, cache, case.is_full
    )
    return out, index.topk_indices, cache

  return run


def make_arguments(case: Case):
  """Hidden states, a cache, and for a shared layer what it is to read.

  The cache is not donated, for it is read again: XLA copies it first, which is
  no kernel and not in the times.
  """
  config, tokens, context = case.config, case.tokens, case.context
  keys = jax.random.split(jax.random.key(0), 4)
  dtype = config.dtype
  hidden = jax.random.normal(keys[0], (1, tokens, config.hidden_size), dtype)
  index_keys = index_key_scales = None
  if case.is_full:
    shape = (1, context, config.index_head_dim)
    index_keys = jax.random.normal(keys[2], shape, dtype)
    if config.quantizes_index_keys:
      index_keys, index_key_scales = pallas_kernels.quantize_rows(index_keys)
  cache = attention.LayerCache(
    jax.random.normal(keys[1], (1, context, config.latent_dim), dtype),
    index_keys,
    index_key_scales,
  )
  k = config.index_topk
  stride = max(1, (context - tokens) // k)
  indices = stride * jnp.arange(k) + jax.random.randint(
    keys[3], (1, tokens, k), 0, stride
  )
  index = attention.IndexState(indices.astype(jnp.int32))
  return hidden, cache, None if case.is_full else index


def summarize(case: Case, kernels, rates: Rates) -> list[dict]:
  """Adds up kinds of kernels, with floors and shares."""
  times = collections.Counter()
  for name, ms in kernels:
    kind = next((k for word, k in _KINDS.items() if word in name), _REST)
    times[kind] += ms
  longest = sorted(kernels, key=lambda kernel: -kernel[1])[:_NUM_LONGEST]
  dtype = jnp.dtype(case.config.dtype).name
  work = work_of(case.config, case.is_full, case.tokens, case.context)
  floors = {
    kind: rates.floor_ms(case.key_dtype if kind == "scores" else dtype, *each)
    for kind, each in work.items()
  }
  total = sum(times.values())
  records = [
    {
      "kind": kind,
      "ms": ms,
      "floor_ms": floors[kind],
      "share": ms / total,
    }
    for kind, ms in sorted(times.items(), key=lambda item: -item[1])
  ]
  floor = sum(floors[kind] for kind in times)
  return [
    *records,
    {
      "kind": "all",
      "ms": total,
      "floor_ms": floor,
      "share": 1.0,
      "num_kernels": len(kernels),
      "longest": longest,
    },
  ]


def work_of(
  config: ic.SparseTransformerConfig, is_full: bool, tokens: int, context: int
) -> dict[str, tuple[float, float]]:
  """Operations and least bytes of each kind of kernel of one layer."""
  itemsize = jnp.dtype(config.dtype).itemsize
  pairs = tokens * (context - (tokens - 1) / 2)
  indexer = costs.indexer_costs(config)
  k = min(config.index_topk, context)
  heads, width = config.num_attention_heads, config.latent_dim
  # The kernel for few rows takes the shared experts too.
  shared = config.n_shared_experts if tokens <= few_rows.MAX_ROWS else 0
  experts = config.num_experts_per_tok + shared
  matrix = config.hidden_size * config.moe_intermediate_size
  used = shared + min(
    config.n_routed_experts, tokens * config.num_experts_per_tok
  )
  rest = (
    costs.projection_flops(config)
    + (indexer.projection_flops if is_full else 0)
    + costs.mlp_flops(config, use_experts=True)
    - 6 * matrix * experts
  )
  return {
    "scores": (
      pairs * indexer.score_flops,
      context * indexer.key_bytes + 4 * pairs,
    ),
    "selection": (0, 4 * pairs),
    "attention": (
      2 * tokens * heads * k * (width + config.kv_lora_rank),
      # From the second-level cache where that holds the rows.
      min(tokens * k, context) * width * itemsize,
    ),
    "experts": (
      2 * tokens * experts * 3 * matrix,
      used * 3 * matrix * itemsize,
    ),
    # Each of its parameters is multiplied and added once a token.
    _REST: (tokens * rest, rest / 2 * itemsize),
  }


if __name__ == "__main__":
  common.run(main)
