# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Time of a schedule from the times of single ops, measured or given."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import pallas_kernels
from indexcache_jax import attention, decoder
from indexcache_jax import config as config_lib
from indexcache_jax import indexer as indexer_lib
from indexcache_jax import model as model_lib
from indexcache_jax import schedule as schedule_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpTimes:
  """Seconds of a phase, prefill or one step of decoding.

  Attributes:
    indexer: a full layer's projections, scores and selection.
    attention: a layer's core attention.
    rest: a layer's projections, norms and MLP.
    constant: once a model, such as embedding and head.
  """

  indexer: float
  attention: float = 0.0
  rest: float = 0.0
  constant: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not 0 <= getattr(self, field.name) < float("inf"):
        raise ValueError(
          f"`{field.name}` must be seconds, 0 or more and finite: got"
          f" {getattr(self, field.name)}."
        )


@dataclasses.dataclass(frozen=True)
class PredictedTimes:
  """Times of a phase in seconds.

  Attributes:
    scheduled: under the schedule.
    all_full: without reuse.
    without_indexers: if no layer ran an indexer.
  """

  scheduled: float
  all_full: float
  without_indexers: float

  @property
  def speedup(self) -> float:
    """Of the schedule over no reuse."""
    return self.all_full / self.scheduled

  @property
  def speedup_limit(self) -> float:
    """Amdahl's limit: the speed-up of a model without any indexer."""
    return self.all_full / self.without_indexers

  @property
  def indexer_share(self) -> float:
    """Share of the indexers in the time without reuse."""
    return 1 - self.without_indexers / self.all_full


def predict_times(
  op_times: OpTimes, schedule: schedule_lib.ReuseSchedule
) -> PredictedTimes:
  """Adds up the ops of a schedule, one after another.

  Launch gaps and overlap between ops are not modelled.

  Args:
    op_times: of one phase at one context.
    schedule: of the model.

  Raises:
    ValueError: if nothing but the indexer takes time, for then the limit of
      the speed-up is infinite.
  """
  num_layers = schedule.num_layers
  rest = op_times.constant + num_layers * (op_times.attention + op_times.rest)
  if rest <= 0:
    raise ValueError(
      "`op_times` must give some time to what is no indexer: got"
      f" {op_times}. Give `attention`, `rest` or `constant`."
    )
  return PredictedTimes(
    scheduled=rest + schedule.num_full * op_times.indexer,
    all_full=rest + num_layers * op_times.indexer,
    without_indexers=rest,
  )


def measure_op_times(
  config: config_lib.SparseTransformerConfig,
  *,
  num_tokens: int,
  context: int,
  batch_size: int = 1,
  num_runs: int = 5,
) -> OpTimes:
  """Times the ops of one layer on this machine, with random parameters.

  Args:
    config: of the model; needs memory for one layer of each MLP kind and for
      embedding and head.
    num_tokens: new tokens: `context` for a prefill, 1 for a step of decoding.
    context: keys, the new tokens included.
    batch_size: sequences.
    num_runs: timed runs after the one that compiles; the median counts.

  Returns:
    Seconds. `rest` is the mean over the layers, each timed as a whole without
    an indexer, less its attention; 0 where noise makes that negative.

  Raises:
    ValueError: unless 1 <= num_tokens <= context.
  """
  if not 1 <= num_tokens <= context:
    raise ValueError(
      "`num_tokens` must be from 1 to `context`: got"
      f" num_tokens={num_tokens}, context={context}."
    )
  bench = _Bench(config, batch_size, num_tokens, context, num_runs)
  kinds = config.mlp_layer_types
  rests = {kind: bench.rest(kind == "sparse") for kind in sorted({*kinds})}
  return OpTimes(
    indexer=bench.indexer(),
    attention=bench.attention(context),
    rest=statistics.fmean(rests[kind] for kind in kinds),
    constant=bench.constant(),
  )


class _Bench:
  """The inputs of a layer, and the clock."""

  def __init__(self, config, batch_size, num_tokens, context, num_runs):
    self._config = config.replace(
      schedule=schedule_lib.ReuseSchedule.all_full(config.num_hidden_layers)
    )
    self._num_runs = num_runs
    self._key = jax.random.key(0)
    self._shape = (batch_size, num_tokens)
    self._hidden = self._random(*self._shape, config.hidden_size)
    self._key_end = jnp.broadcast_to(
      jnp.arange(context - num_tokens, context, dtype=jnp.int32) + 1,
      self._shape,
    )
    self._context = attention.make_context(
      self._config, jnp.zeros(self._shape, jnp.int32)
    )
    self._keys = context

  def indexer(self):
    config = self._config
    latent = self._random(*self._shape, config.q_lora_rank)
    index_k = self._random(self._shape[0], self._keys, config.index_head_dim)
    key_scale = None
    if config.quantizes_index_keys:
      index_k, key_scale = pallas_kernels.quantize_rows(index_k)
    module = indexer_lib.Indexer(config)
    rotary = self._context.rotary
    params = jax.jit(module.init)(self._key, self._hidden, latent, rotary)

    def select(params, hidden, latent, index_k, key_scale, key_end):
      outputs = module.apply(params, hidden, latent, rotary)
      scored = indexer_lib.score_inputs(outputs, config)
      topk_indices = pallas_kernels.indexer_topk(
        scored.index_q,
        index_k,
        scored.index_weights,
        jnp.zeros_like(key_end),
        key_end,
        k=config.index_topk,
        key_scale=key_scale,
        implementation=config.implementation,
      )
      # The new keys go to the cache: they are work as well.
      return topk_indices, scored.index_k

    return self._time(
      select, params, self._hidden, latent, index_k, key_scale, self._key_end
    )

  def attention(self, num_keys):
    config = self._config
    query = self._random(
      *self._shape, config.num_attention_heads, config.latent_dim
    )
    rows = self._random(self._shape[0], num_keys, config.latent_dim)

    def attend(query, rows, topk_indices):
      return pallas_kernels.sparse_mla(
        query,
        rows,
        topk_indices,
        scale=config.attention_scale,
        value_dim=config.kv_lora_rank,
        implementation=config.implementation,
      )

    return self._time(attend, query, rows, self._topk_indices(num_keys))

  def rest(self, use_experts):
    index = attention.IndexState(self._topk_indices(self._shape[1]))
    block = decoder.DecoderLayer(self._config, use_experts=use_experts)

    def run(params, hidden, index):
      return block.apply(params, hidden, self._context, index, None, False)[0]

    params = jax.jit(
      lambda key: block.init(
        key, self._hidden, self._context, index, None, False
      )
    )(self._key)
    whole = self._time(run, params, self._hidden, index)
    return max(whole - self.attention(self._shape[1]), 0.0)

  def constant(self):
    model = model_lib.SparseTransformer(self._config)
    tokens = jnp.zeros(self._shape, jnp.int32)

    @jax.jit
    def init(key):
      # These two methods alone: no layer is built.
      embed = model.init(key, tokens, method="embed")["params"]
      hidden = self._hidden[:, -1:]
      return {
        "params": embed | model.init(key, hidden, method="logits")["params"]
      }

    def ends(params, tokens):
      hidden = model.apply(params, tokens, method="embed")
      last = model.apply(params, hidden[:, -1:], method="logits")
      return hidden, last

    return self._time(ends, init(self._key), tokens)

  def _topk_indices(self, num_keys):
    """The last keys that each query sees, -1 where it sees fewer than K."""
    offset = num_keys - self._shape[1]
    ends = jnp.arange(self._shape[1]) + offset
    places = jnp.arange(self._config.index_topk)
    first = jnp.maximum(ends - len(places) + 1, 0)[:, None]
    indices = jnp.where(first + places > ends[:, None], -1, first + places)
    return jnp.broadcast_to(
      indices.astype(jnp.int32), (self._shape[0], *indices.shape)
    )

  def _random(self, *shape):
    return jax.random.normal(self._key, shape, self._config.dtype)

  def _time(self, function: Callable, *arguments) -> float:
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(self._num_runs):
      start = time.perf_counter()
      jax.block_until_ready(compiled(*arguments))
      seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
