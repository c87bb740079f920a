# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares fast inference with the float32 reference at length.

  python -m experiments.check_inference --context=32768

The fast path is what serves: the platform's kernels in the model's dtype, a
prompt in chunks, then single tokens through the cache. The reference is the
same procedure in float32 through plain XLA. Reported for each schedule: the
relative error of the logits after the prompt and after each further token
(given, not drawn), the divergence of the distributions, how often the likeliest
token is the same, and the share of selected keys that are. Beside the fast path
stand plain XLA in the same dtype, whose error is that of rounding alone, and
the fast path with 8-bit index keys.

A token whose router prefers another expert, because two were nearly equal,
differs by a whole expert. So there are two models: with dense MLPs, where every
error is a kernel's or a rounding's, and with experts, as served.
"""

import datetime
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jaxtyping import Array, Float, Float32, Int32

import indexcache_jax as ic
from experiments import common, provenance, random_model
from indexcache_jax import presets

_PRESET = flags.DEFINE_enum(
  "preset", "glm_47_flash_dsa", sorted(presets.PRESETS), "The model's widths."
)
_LAYERS = flags.DEFINE_integer(
  "num_layers", 4, "Layers of the model.", lower_bound=1
)
_CONTEXT = flags.DEFINE_integer(
  "context", 32768, "Tokens of the prompt.", lower_bound=2
)
_NEW_TOKENS = flags.DEFINE_integer(
  "new_tokens", 8, "Single tokens after it.", lower_bound=1
)
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size", 4096, "Tokens of a prefill chunk.", lower_bound=1
)
_SCHEDULES = flags.DEFINE_list(
  "schedules", ["full", "FSFS", "FSSS"], "As --schedule of other scripts."
)
_MLPS = flags.DEFINE_multi_enum(
  "mlp",
  ["dense", "experts"],
  ["dense", "experts"],
  "The layers' MLPs, a model each.",
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/inference", "Where check.jsonl and check.md go."
)
# Queries of the last chunk whose selections are compared.
_NUM_QUERIES = 256
_COLUMNS = (
  *("mlp", "schedule", "path"),
  *("logits_error", "decode_logits_error", "worst_decode_logits_error"),
  *("divergence", "same_likeliest", "same_keys_first_layer", "same_keys"),
  "same_keys_as_fast",
)


def main(argv):
  """Compares each model under each schedule and prints a table."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  source = {
    **common.environment(),
    "command": provenance.command(),
    "preset": _PRESET.value,
    "num_layers": _LAYERS.value,
    "context": _CONTEXT.value,
    "date": datetime.date.today().isoformat(),
  }
  path = pathlib.Path(_OUTPUT_DIR.value) / "check.jsonl"
  records = []
  print(common.table_head(_COLUMNS))
  for mlp in dict.fromkeys(_MLPS.value):
    config = model_config(mlp)
    params = random_model.random_params(config)
    for name in _SCHEDULES.value:
      schedule = ic.ReuseSchedule.parse(name, _LAYERS.value)
      for record in compare(config.replace(schedule=schedule), params):
        record = {"mlp": mlp, "schedule": name, **record}
        records.append({**record, **source})
        print(common.table_row(record, _COLUMNS), flush=True)
        common.write_records(path, records, _COLUMNS)


def model_config(mlp: str) -> ic.SparseTransformerConfig:
  """Of a model whose MLPs are all "dense", or "experts" as the preset's."""
  config = presets.PRESETS[_PRESET.value]().replace(
    num_hidden_layers=_LAYERS.value
  )
  if mlp == "dense":
    config = config.replace(first_k_dense_replace=_LAYERS.value)
  return config


def compare(config, params):
  """Yields a record of each path."""
  plain = config.replace(implementation="xla")
  expected = run(plain.replace(dtype=jnp.float32), params)
  dtype = jnp.dtype(config.dtype).name
  paths = {
    dtype: config,
    f"{dtype}, plain XLA": plain,
    "float8 index keys": config.replace(index_key_dtype=jnp.float8_e4m3fn),
  }
  fast_selections = None
  for name, path in paths.items():
    actual = run(path, params)
    fast_selections = fast_selections or actual[1]
    yield {
      "path": name,
      **differences(actual, expected),
      # Against the path without quantised keys, the first.
      "same_keys_as_fast": mean_share(actual[1], fast_selections),
    }


def run(
  config: ic.SparseTransformerConfig, params: dict
) -> tuple[Float32[np.ndarray, "U vocab"], list[Int32[Array, "T K"]]]:
  """Prefills in chunks, then feeds single tokens.

  Returns:
    Logits after the prompt and after each further token, and each full
    layer's selection for the last queries of the prompt.
  """
  model = ic.SparseTransformer(config)
  rng = np.random.default_rng(0)
  context, new_tokens = _CONTEXT.value, _NEW_TOKENS.value
  tokens = rng.integers(
    0, config.vocab_size, (1, context + new_tokens), np.int32
  )
  cache = ic.init_cache(config, 1, context + new_tokens)
  for start in range(0, context, _CHUNK_SIZE.value):
    chunk = tokens[:, start : min(start + _CHUNK_SIZE.value, context)]
    last, cache, selections = _extend(model, params, chunk, cache)
  logits = [last]
  kept = [
    selections[layer][0, -_NUM_QUERIES:]
    for layer in config.schedule.full_layers
  ]
  for place in range(context, context + new_tokens):
    last, cache, _ = _extend(model, params, tokens[:, place : place + 1], cache)
    logits.append(last)
  return np.concatenate(jax.device_get(logits)), kept


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(3,))
def _extend(model, params, tokens, cache):
  logits, aux = model.apply(
    {"params": params}, tokens, cache=cache, logits_for="last"
  )
  return logits[:, 0], aux.cache, aux.topk_indices


def differences(actual, expected) -> dict[str, float]:
  """What distinguishes two runs."""
  (logits, selections), (reference, reference_selections) = actual, expected
  errors = np.linalg.norm(logits - reference, axis=-1) / np.linalg.norm(
    reference, axis=-1
  )
  return {
    "logits_error": float(errors[0]),
    "decode_logits_error": float(np.median(errors[1:])),
    "worst_decode_logits_error": float(errors[1:].max()),
    "divergence": float(divergence(logits, reference).max()),
    "same_likeliest": float(
      np.mean(logits.argmax(axis=-1) == reference.argmax(axis=-1))
    ),
    "same_keys_first_layer": mean_share(
      selections[:1], reference_selections[:1]
    ),
    "same_keys": mean_share(selections, reference_selections),
  }


def mean_share(
  actual: list[Int32[Array, "T K"]], expected: list[Int32[Array, "T K"]]
) -> float:
  """Of the expected keys, over layers."""
  pairs = zip(actual, expected, strict=True)
  return float(np.mean([same_keys(a, b) for a, b in pairs]))


@jax.jit
def divergence(
  logits: Float[Array, "U vocab"], reference: Float[Array, "U vocab"]
) -> Float32[Array, " U"]:
  """KL divergence of each distribution from the reference's, in nats."""
  log_p = jax.nn.log_softmax(reference)
  return jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits)), axis=-1)


@jax.jit
def same_keys(
  actual: Int32[Array, "T K"], expected: Int32[Array, "T K"]
) -> Float32[Array, ""]:
  """Share of the expected keys that were selected."""

  def present(row, keys):
    # Both ascend, with -1 at the end.
    row = jnp.where(row < 0, jnp.iinfo(jnp.int32).max, row)
    place = jnp.searchsorted(row, keys).clip(max=len(row) - 1)
    return (row[place] == keys) & (keys >= 0)

  found = jax.vmap(present)(actual, expected)
  return jnp.sum(found) / jnp.sum(expected >= 0)


if __name__ == "__main__":
  common.run(main)
