# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `bench_kernels` runs: calls of the ops at real shapes, with a check."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk

# Queries, or rows, that a check compares with the reference.
_CHECKED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """One call of one op.

  Attributes:
    op: the public function, with "_backward" for its gradient.
    name: model or heads, phase, keys, dtype.
    make: from a key to the arguments.
    function: of the arguments.
    error: of arguments and result; must not exceed `tolerance`.
    tolerance: of a relative error; 0 where the result is exact.
    work: floating-point operations, or bytes, that the call needs.
    unit: "TFLOP/s" or "TB/s".
    ceiling: "bfloat16", "float8_e4m3fn" (a matrix product) or "copy".
  """

  op: str
  name: str
  make: Callable[[jax.Array], tuple[Any, ...]]
  function: Callable
  error: Callable[[tuple[Any, ...], Any], float]
  tolerance: float
  work: float
  unit: str
  ceiling: str


def workloads() -> list[Workload]:
  """Every workload, in the order of the table."""
  return [
    *_top_k(),
    *_indexer_scores(),
    *_indexer_topk(),
    *_sparse_mla(),
    *_sparse_mla_backward(),
    *_selected_scores(),
    *_dense_attention(),
    *_expert_mlp(),
  ]


def _normal(key, shape, dtype=jnp.bfloat16):
  # Jitted, lest a float32 copy of the largest arrays is made.
  return jax.jit(
    lambda key: jax.random.normal(key, shape, jnp.float32).astype(dtype)
  )(key)


def _relative_error(actual, expected):
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _causal_bounds(num_queries, num_keys, batch=1):
  """The queries are the last tokens; each sees itself and all before."""
  end = num_keys - num_queries + 1 + jnp.arange(num_queries, dtype=jnp.int32)
  end = jnp.broadcast_to(end, (batch, num_queries))
  return jnp.zeros_like(end), end


def _selection(key, batch, num_queries, num_keys, k):
  """One random row of each of k equal ranges: ascending, as `top_k` has it."""
  stride = num_keys // k
  offset = jax.random.randint(key, (batch, num_queries, k), 0, stride)
  return (stride * jnp.arange(k) + offset).astype(jnp.int32)


# Rows, keys, what the scores are like.
_TOP_K = {
  "4096x32768": (4096, 32768, "normal"),
  "1024x131072": (1024, 131072, "normal"),
  "1024x131072 98% ties": (1024, 131072, "ties"),
  "1024x131072 narrow band": (1024, 131072, "narrow"),
  "64x131072": (64, 131072, "normal"),
  "8x131072": (8, 131072, "normal"),
  "1x131072": (1, 131072, "normal"),
  "128x1048576": (128, 1048576, "normal"),
  "1x1048576": (1, 1048576, "normal"),
}


def _scores(key, rows, num_keys, kind):
  scores = _normal(key, (rows, num_keys), jnp.float32)
  if kind == "ties":
    is_tie = jax.random.uniform(key, scores.shape) < 0.98
    return jnp.where(is_tie, 0.0, jnp.abs(scores))
  if kind == "narrow":
    # A few thousand neighbouring floats.
    return 1.0 + scores * (256 * np.finfo(np.float32).eps)
  return scores


def _top_k():
  def check(args, out):
    (scores,) = args
    rows = slice(0, _CHECKED)
    expected = pk.top_k(scores[rows], 2048, implementation="xla")
    return float(jnp.sum(out[rows] != expected))

  return [
    Workload(
      op="top_k",
      name=name,
      make=lambda key, s=(rows, num_keys, kind): (_scores(key, *s),),
      function=functools.partial(pk.top_k, k=2048),
      error=check,
      tolerance=0,
      work=4 * rows * num_keys,
      unit="TB/s",
      ceiling="copy",
    )
    for name, (rows, num_keys, kind) in _TOP_K.items()
  ]


def _indexer_inputs(key, batch, num_queries, num_keys, heads, dtype):
  """Arguments of the indexer; float8 with the scales of its rows."""
  keys = jax.random.split(key, 3)
  index_q = _normal(keys[0], (batch, num_queries, heads, 128))
  index_k = _normal(keys[1], (batch, num_keys, 128))
  weights = _normal(keys[2], (batch, num_queries, heads), jnp.float32)
  bounds = _causal_bounds(num_queries, num_keys, batch)
  if dtype == jnp.bfloat16:
    return index_q, index_k, weights, *bounds, None
  index_q, query_scale = jax.jit(pk.quantize_rows)(index_q)
  index_k, key_scale = jax.jit(pk.quantize_rows)(index_k)
  return index_q, index_k, weights * query_scale, *bounds, key_scale


def _last_queries(args):
  """The same call for a few queries at the end, for a check."""
  index_q, index_k, weights, start, end, key_scale = args
  few = slice(-_CHECKED, None)
  return (
    index_q[:, few],
    index_k,
    weights[:, few],
    start[:, few],
    end[:, few],
    key_scale,
  )


def _causal_pairs(num_queries, num_keys):
  return num_queries * (num_keys - (num_queries - 1) / 2)


def _dtype_name(dtype):
  return "bf16" if dtype == jnp.bfloat16 else "fp8"


# The tensor cores sum float8 products in fewer bits than float32's.
_SCORE_ERROR = {"bfloat16": 1e-5, "float8_e4m3fn": 5e-4}


def _widened(args):
  """The same call in float32: the reference of the numbers, not the speed."""
  return tuple(
    x.astype(jnp.float32) if x is not None and x.dtype.itemsize < 4 else x
    for x in args
  )


def _indexer_scores():
  def run(*args):
    return pk.indexer_scores(*args[:5], key_scale=args[5])

  def check(args, out):
    few = _widened(_last_queries(args))
    expected = pk.indexer_scores(
      *few[:5], key_scale=few[5], implementation="xla"
    )
    actual = out[:, -_CHECKED:]
    if not bool(jnp.all(jnp.isfinite(actual) == jnp.isfinite(expected))):
      return float("inf")
    return _relative_error(
      *(jnp.where(jnp.isfinite(x), x, 0) for x in (actual, expected))
    )

  return [
    Workload(
      op="indexer_scores",
      name=f"4096x{num_keys} {heads} heads {_dtype_name(dtype)}",
      make=functools.partial(
        _indexer_inputs,
        batch=1,
        num_queries=4096,
        num_keys=num_keys,
        heads=heads,
        dtype=dtype,
      ),
      function=run,
      error=check,
      tolerance=_SCORE_ERROR[jnp.dtype(dtype).name],
      work=2 * _causal_pairs(4096, num_keys) * heads * 128,
      unit="TFLOP/s",
      ceiling=jnp.dtype(dtype).name,
    )
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn)
    for num_keys in (32768, 131072)
    for heads in (64, 32)
  ]


# Batch, queries, keys.
_INDEXER_TOPK = {
  "4096x131072": (1, 4096, 131072),
  "decode b1 131072": (1, 1, 131072),
  "decode b8 131072": (8, 1, 131072),
  "decode b64 131072": (64, 1, 131072),
  "512x1048576": (1, 512, 1048576),
}


def _indexer_topk():
  def run(*args):
    return pk.indexer_topk(*args[:5], k=2048, key_scale=args[5])

  def check(args, out):
    """Share of selected keys whose score is below the reference's least."""
    few = _widened(_last_queries(args))
    slack = 10 * _SCORE_ERROR[args[0].dtype.name]
    scores = pk.indexer_scores(*few[:5], key_scale=few[5], implementation="xla")
    expected = pk.top_k(scores, 2048, implementation="xla")
    actual = np.asarray(out[:, -_CHECKED:])
    scores, expected = np.asarray(scores), np.asarray(expected)
    wrong = 0
    for row in np.ndindex(actual.shape[:2]):
      least = scores[row][expected[row]].min()
      chosen = actual[row][actual[row] >= 0]
      # Another order of summation may swap neighbours at the boundary.
      wrong += np.sum(scores[row][chosen] < least - slack * abs(least))
      wrong += len(np.unique(chosen)) != len(expected[row])
    return float(wrong)

  return [
    Workload(
      op="indexer_topk",
      name=f"{name} 32 heads {_dtype_name(dtype)}",
      make=functools.partial(
        _indexer_inputs,
        batch=batch,
        num_queries=queries,
        num_keys=num_keys,
        heads=32,
        dtype=dtype,
      ),
      function=run,
      error=check,
      tolerance=0,
      work=2 * batch * _causal_pairs(queries, num_keys) * 32 * 128,
      unit="TFLOP/s",
      ceiling=jnp.dtype(dtype).name,
    )
    for dtype in (jnp.float8_e4m3fn, jnp.bfloat16)
    for name, (batch, queries, num_keys) in _INDEXER_TOPK.items()
  ]


_SCALE = 192**-0.5
# Batch, queries, keys, heads.
_SPARSE_MLA = {
  "4096x32768 128 heads": (1, 4096, 32768, 128),
  "4096x32768 64 heads": (1, 4096, 32768, 64),
  "4096x32768 32 heads": (1, 4096, 32768, 32),
  "4096x131072 128 heads": (1, 4096, 131072, 128),
  "4096x131072 64 heads": (1, 4096, 131072, 64),
  "4096x131072 20 heads": (1, 4096, 131072, 20),
  "4096x1048576 64 heads": (1, 4096, 1048576, 64),
  "decode b1 131072 64 heads": (1, 1, 131072, 64),
  "decode b8 131072 64 heads": (8, 1, 131072, 64),
  "decode b64 131072 64 heads": (64, 1, 131072, 64),
}
# Of them, those with latents in float8, too.
_FLOAT8_LATENTS = (
  "4096x131072 64 heads",
  "4096x131072 20 heads",
  "decode b1 131072 64 heads",
  "decode b8 131072 64 heads",
  "decode b64 131072 64 heads",
)


def _mla_inputs(key, batch, num_queries, num_keys, heads, is_float8=False):
  keys = jax.random.split(key, 3)
  kv_latent = _normal(keys[1], (batch, num_keys, 576))
  if is_float8:
    # A sequence at a time, lest float32 copies of the largest caches are made.
    kv_latent = jax.jit(
      lambda kv: jax.lax.map(lambda row: pk.quantize_latents(row, 512), kv)
    )(kv_latent)
  return (
    _normal(keys[0], (batch, num_queries, heads, 576)),
    kv_latent,
    _selection(keys[2], batch, num_queries, num_keys, 2048),
  )


def _attend(query, kv_latent, topk_indices, implementation=None):
  return pk.sparse_mla(
    query,
    kv_latent,
    topk_indices,
    scale=_SCALE,
    value_dim=512,
    implementation=implementation,
  )


def _sparse_mla():
  def check(args, out):
    query, kv_latent, topk_indices = args
    few = slice(-_CHECKED, None)
    # Only the rows that are read, in float32.
    rows = jax.tree.map(
      lambda table: jax.vmap(lambda rows, i: rows[i])(
        table, topk_indices[:, few]
      ),
      kv_latent,
    )
    if isinstance(rows, pk.QuantizedLatents):
      rows = pk.dequantize_latents(rows)
    batch, queries, k, width = rows.shape
    flat = batch * queries
    expected = _attend(
      query[:, few].astype(jnp.float32).reshape(flat, 1, -1, width),
      rows.astype(jnp.float32).reshape(flat, k, width),
      jnp.broadcast_to(jnp.arange(k), (flat, 1, k)),
      implementation="xla",
    )
    return _relative_error(out[:, few], expected.reshape(out[:, few].shape))

  names = [(name, False) for name in _SPARSE_MLA]
  names += [(name, True) for name in _FLOAT8_LATENTS]
  return [
    Workload(
      op="sparse_mla",
      name=f"{name} fp8" if is_float8 else name,
      make=functools.partial(
        _mla_inputs,
        batch=batch,
        num_queries=queries,
        num_keys=num_keys,
        heads=heads,
        is_float8=is_float8,
      ),
      function=_attend,
      error=check,
      tolerance=4e-3,
      work=2 * batch * queries * heads * 2048 * (576 + 512),
      unit="TFLOP/s",
      ceiling="bfloat16",
    )
    for name, is_float8 in names
    for batch, queries, num_keys, heads in (_SPARSE_MLA[name],)
  ]


def _vjp(form, *args):
  """The pull-back of `form` at `args`, an argument that jit takes."""
  return jax.jit(lambda *args: jax.vjp(form, *args))(*args)


def _sparse_mla_backward():
  def make(key, heads):
    query, kv_latent, selected = _mla_inputs(key, 1, 2048, 8192, heads)
    out, vjp = _vjp(lambda q, kv: _attend(q, kv, selected), query, kv_latent)
    return vjp, _normal(key, out.shape), query, kv_latent, selected

  def check(args, out):
    _, grad, query, kv_latent, selected = args
    few = 64
    # The gradient of the rows sums over queries, so these are all there are.
    grads = [
      _vjp(
        lambda q, kv, i=implementation: _attend(
          q, kv, selected[:, :few], implementation=i
        ),
        query[:, :few].astype(dtype),
        kv_latent.astype(dtype),
      )[1](grad[:, :few].astype(dtype))
      for implementation, dtype in ((None, jnp.bfloat16), ("xla", jnp.float32))
    ]
    errors = [_relative_error(a, b) for a, b in zip(*grads, strict=True)]
    return max(*errors, _relative_error(out[0][:, :few], grads[1][0]))

  return [
    Workload(
      op="sparse_mla_backward",
      name=f"2048x8192 {heads} heads",
      make=functools.partial(make, heads=heads),
      function=lambda vjp, grad, *_: vjp(grad),
      error=check,
      tolerance=8e-3,
      work=2 * 2048 * heads * 2048 * (3 * 576 + 2 * 512),
      unit="TFLOP/s",
      ceiling="bfloat16",
    )
    for heads in (64, 128)
  ]


def _selected_scores():
  queries, num_keys, heads, k = 4096, 32768, 32, 2048

  def inputs(key):
    index_q, index_k, weights, *_ = _indexer_inputs(
      key, 1, queries, num_keys, heads, jnp.bfloat16
    )
    return index_q, index_k, weights, _selection(key, 1, queries, num_keys, k)

  def check(args, out):
    index_q, index_k, weights, selected = args
    few = slice(-_CHECKED, None)
    expected = pk.selected_indexer_scores(
      index_q[:, few].astype(jnp.float32),
      index_k.astype(jnp.float32),
      weights[:, few],
      selected[:, few],
      implementation="xla",
    )
    return _relative_error(out[:, few], expected)

  def make_backward(key):
    *arrays, selected = inputs(key)
    out, vjp = _vjp(
      lambda *arrays: pk.selected_indexer_scores(*arrays, selected), *arrays
    )
    return vjp, _normal(key, out.shape, jnp.float32), *arrays, selected

  def check_backward(args, out):
    _, grad, *arrays, selected = args
    few = slice(0, 64)
    index_q, index_k, weights = (x.astype(jnp.float32) for x in arrays)
    _, vjp = _vjp(
      lambda q, w: pk.selected_indexer_scores(
        q, index_k, w, selected[:, few], implementation="xla"
      ),
      index_q[:, few],
      weights[:, few],
    )
    expected = vjp(grad[:, few])
    return max(
      _relative_error(out[0][:, few], expected[0]),
      _relative_error(out[2][:, few], expected[1]),
    )

  shared = {
    "name": f"{queries}x{num_keys} {heads} heads",
    "unit": "TFLOP/s",
    "ceiling": "bfloat16",
  }
  flops = 2 * queries * k * heads * 128
  return [
    Workload(
      op="selected_indexer_scores",
      make=inputs,
      function=pk.selected_indexer_scores,
      error=check,
      tolerance=1e-5,
      work=flops,
      **shared,
    ),
    Workload(
      op="selected_indexer_scores_backward",
      make=make_backward,
      function=lambda vjp, grad, *_: vjp(grad),
      error=check_backward,
      tolerance=8e-3,
      # The products again, and one each for queries and keys.
      work=3 * flops,
      **shared,
    ),
  ]


def _dense_attention():
  def make(key, heads, queries=512, num_keys=32768):
    keys = jax.random.split(key)
    return (
      _normal(keys[0], (1, queries, heads, 576)),
      _normal(keys[1], (1, num_keys, 576)),
      *_causal_bounds(queries, num_keys),
    )

  def run(*args, implementation=None):
    return pk.dense_mla_residuals(
      *args, scale=_SCALE, implementation=implementation
    )

  def check(args, out):
    query, kv_latent, start, end = args
    few = slice(-_CHECKED, None)
    expected = run(
      query[:, few].astype(jnp.float32),
      kv_latent.astype(jnp.float32),
      start[:, few],
      end[:, few],
      implementation="xla",
    )
    return max(
      _relative_error(a[:, few], b) for a, b in zip(out, expected, strict=True)
    )

  return [
    Workload(
      op="dense_mla_residuals",
      name=f"512x32768 {heads} heads",
      make=functools.partial(make, heads=heads),
      function=run,
      error=check,
      tolerance=1e-4,
      # Logits twice: for the sum, then for the probabilities.
      work=2 * 2 * _causal_pairs(512, 32768) * heads * 576,
      unit="TFLOP/s",
      ceiling="bfloat16",
    )
    for heads in (64, 20)
  ]


def _expert_mlp():
  experts, choices, width, inner = 64, 4, 2048, 1536

  def make(key, tokens):
    keys = jax.random.split(key, 5)
    # Every expert gets as many rows as another.
    chosen = jnp.arange(tokens * choices, dtype=jnp.int32) % experts
    matrix = inner**-0.5 * _normal(keys[0], (3, experts, width, inner))
    return (
      _normal(keys[1], (tokens, width)),
      chosen.reshape(tokens, choices),
      jax.random.uniform(keys[2], (tokens, choices)),
      matrix[0],
      matrix[1],
      matrix[2].swapaxes(1, 2),
    )

  def check(args, out):
    rows, chosen, weights, *matrices = args
    few = slice(0, 8)
    expected = pk.expert_mlp(
      rows[few].astype(jnp.float32),
      chosen[few],
      weights[few],
      *(x.astype(jnp.float32) for x in matrices),
      implementation="xla",
    )
    return _relative_error(out[few], expected)

  def workload(tokens):
    expert = 3 * width * inner
    is_few = tokens <= 64
    read = min(tokens * choices, experts) * expert * 2
    return Workload(
      op="expert_mlp",
      name=f"{tokens} tokens, 4 of 64 experts 2048x1536",
      make=functools.partial(make, tokens=tokens),
      function=pk.expert_mlp,
      error=check,
      tolerance=1e-2,
      work=read if is_few else 2 * tokens * choices * expert,
      unit="TB/s" if is_few else "TFLOP/s",
      ceiling="copy" if is_few else "bfloat16",
    )

  return [workload(tokens) for tokens in (1, 16, 64, 5000)]
