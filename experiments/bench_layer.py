# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Times one attention layer of a model, full and shared, against plain XLA.

  python -m experiments.bench_layer --contexts=32768,131072

The layer is that of the model's code (projections, indexer, selection, sparse
attention), over a whole sequence. "backward" is what training with the
distillation loss adds to it: the output's gradient, and the divergence of the
indexer from this layer's attention on the selected keys. Times are by the wall
clock, the median of batches of back-to-back calls. Memory is what the compiled
program holds beside its arguments and results.
"""

import datetime
import functools
import pathlib

import jax
import jax.numpy as jnp
from absl import flags, logging

from experiments import common, kernel_timing, provenance
from indexcache_jax import attention, distillation, presets

_PRESET = flags.DEFINE_enum(
  "preset", "glm_47_flash_dsa", sorted(presets.PRESETS), "Whose layer."
)
_CONTEXTS = flags.DEFINE_list(
  "contexts", ["32768", "131072"], "Tokens of the sequence."
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations", ["default", "xla"], "Of the ops: names, or default."
)
_PHASES = flags.DEFINE_multi_enum(
  "phases",
  ["forward", "backward"],
  ["forward", "backward"],
  "What to time; repeat the flag for several.",
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/layer", "Where layer.jsonl and layer.md go."
)
_LAUNCHES = flags.DEFINE_integer(
  "launches", 6, "Back-to-back calls, of all batches.", lower_bound=1
)
_COLUMNS = (
  *("context", "layer", "phase", "implementation"),
  *("ms", "min_ms", "max_ms", "temp_gib"),
)


def main(argv):
  """Times every combination, prints a table and writes it."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  source = {
    **common.environment(),
    "command": provenance.command(),
    "preset": _PRESET.value,
    "date": datetime.date.today().isoformat(),
  }
  config = presets.PRESETS[_PRESET.value]()
  path = pathlib.Path(_OUTPUT_DIR.value) / "layer.jsonl"
  records = []
  for context in map(int, _CONTEXTS.value):
    for name in _IMPLEMENTATIONS.value:
      bench = LayerBench(
        config.replace(implementation=None if name == "default" else name),
        context,
      )
      for phase in _PHASES.value:
        for kind in ("full", "shared"):
          record = {
            "context": context,
            "layer": kind,
            "phase": phase,
            "implementation": name,
            **bench.time(kind, phase, _LAUNCHES.value),
          }
          print(common.table_row(record, _COLUMNS), flush=True)
          records.append({**record, **source})
          common.write_records(path, records, _COLUMNS)


class LayerBench:
  """One layer with random parameters, a random input, and its functions."""

  def __init__(self, config, context: int):
    """Makes parameters, input and the selection that a shared layer reads."""
    self._config = config
    self._layer = attention.SparseMLA(config)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, context, config.hidden_size)
    self._hidden = jax.random.normal(keys[0], shape, config.dtype)
    self._grad = jax.random.normal(keys[1], shape, config.dtype)
    self._context = attention.make_context(
      config, jnp.zeros((1, context), jnp.int32)
    )
    self._params = {
      kind: jax.jit(functools.partial(self._init, is_full=kind == "full"))(
        keys[2]
      )
      for kind in ("full", "shared")
    }
    _, self._index, _ = jax.jit(functools.partial(self._forward, is_full=True))(
      self._params["full"], self._hidden, None
    )

  def _init(self, key, *, is_full):
    few = self._hidden[:, :8]
    context = attention.make_context(self._config, jnp.zeros((1, 8), jnp.int32))
    indices = jnp.zeros((1, 8, self._config.index_topk), jnp.int32)
    index = None if is_full else attention.IndexState(indices)
    return self._layer.init(key, few, context, index, None, is_full, "sparse")[
      "params"
    ]

  def _forward(self, params, hidden, index, *, is_full):
    output, index, _, inputs = self._layer.apply(
      {"params": params}, hidden, self._context, index, None, is_full, "sparse"
    )
    return output, index, inputs

  def _loss(self, params, hidden, index, grad, *, is_full):
    output, index, inputs = self._forward(
      params, hidden, index, is_full=is_full
    )
    divergence = distillation.selected_index_kl(inputs, index, self._config)
    return jnp.sum((output * grad).astype(jnp.float32)) + jnp.sum(divergence)

  def time(self, kind: str, phase: str, launches: int) -> dict[str, float]:
    """Milliseconds and GiB of one phase of a full or shared layer."""
    is_full = kind == "full"
    index = None if is_full else self._index
    args = (self._params[kind], self._hidden, index)
    if phase == "forward":
      function = functools.partial(self._forward, is_full=is_full)
      # Only what the next layer reads.
      run = lambda *args: function(*args)[0]  # noqa: E731
    else:
      args = (*args, self._grad)
      run = jax.grad(functools.partial(self._loss, is_full=is_full), (0, 1))
    compiled = jax.jit(run).lower(*args).compile()
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    times = kernel_timing.wall_ms(compiled, *args, launches=launches)
    return {
      "ms": times.median,
      "min_ms": times.min,
      "max_ms": times.max,
      "temp_gib": temp_bytes / 2**30,
    }


if __name__ == "__main__":
  common.run(main)
