# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse MLA on Hopper: entry, limits, padding, and the split over keys.

Up to 64 heads need no padding: copies on the card fill a tile with 0 behind a
query's heads, and skip what lies there on their way back.

`mosaic_gpu_forward` is the attention, `mosaic_gpu_forward_few_heads` that of at
most 32 heads of many queries, `mosaic_gpu_forward_combine` joins splits,
`mosaic_gpu_forward_probs` is the mean probabilities, `mosaic_gpu_backward` the
gradient.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int32

from pallas_kernels.hopper import chip
from pallas_kernels.sparse_attention import mosaic_gpu_backward as backward
from pallas_kernels.sparse_attention import mosaic_gpu_forward as forward
from pallas_kernels.sparse_attention import (
  mosaic_gpu_forward_combine as combine,
)
from pallas_kernels.sparse_attention import (
  mosaic_gpu_forward_few_heads as few_heads,
)
from pallas_kernels.sparse_attention import mosaic_gpu_forward_items as items
from pallas_kernels.sparse_attention import mosaic_gpu_forward_probs as probs
from pallas_kernels.sparse_attention import (
  mosaic_gpu_shared_rows as shared_rows,
)
from pallas_kernels.sparse_attention import quantization, reference
from pallas_kernels.sparse_attention.quantization import QuantizedLatents
from pallas_kernels.sparse_attention.reference import SparseMLAResiduals

# Three arrays of 64 rows of it, two more of 64 x 64: all the shared memory.
_MAX_WIDTH = 576
_MAX_HEADS = 2 * items.ROWS
# Two warpgroups share the value columns, in tiles of 64.
_VALUE_MULTIPLE = 2 * items.TILE
# Each warpgroup's share is of whole tiles of 128 float8 columns.
_QUANTIZED_MULTIPLE = 2 * quantization.BLOCK
# Queries that share rows, and shared memory to merge theirs: two blocks of it
# fit a multiprocessor.
_MOST_TOGETHER, _SHARED_ROWS_BYTES = 4, 112 << 10
# In steps' worth of time: what a block spends on an item beside its steps, what
# a sum over splits takes, and what each part adds to it. Ranks as measured, 8
# queries of 64 heads: 19.7 us in 8 parts, 21.4 in 16, 23 in 4.
_ITEM_STEPS, _COMBINE_STEPS, _PART_STEPS = 2, 1, 0.02


def sparse_mla(
  query: Float[Array, "B T N C"],
  kv_latent: Float[Array, "B S C"] | QuantizedLatents,
  topk_indices: Int32[Array, "B T K"],
  *,
  scale: float,
  value_dim: int,
  shares_rows: bool = False,
) -> tuple[Float[Array, "B T N {value_dim}"], SparseMLAResiduals]:
  """Attends in bfloat16, without a copy of the cache at 576 columns.

  Widths that are no multiple of 64, values of no multiple of 128 columns, 65 to
  127 heads and rows of no multiple of 128 are padded: copies.
  Quantized latents are widened as they are gathered, to the same results as
  those of `dequantize_latents` bit for bit; their gradient is XLA's.

  Raises:
    NotImplementedError: a chip, dtype or shape that the kernels can't run.
  """
  chip.chip()
  width = query.shape[-1]
  padded_values = _round_up(value_dim, _VALUE_MULTIPLE)
  padded_width = max(_round_up(width, items.TILE), padded_values)
  _check(query, kv_latent, topk_indices, padded_width)
  count = topk_indices.shape[-1]
  columns = (0, padded_width - width)
  out, residuals = _attend(
    jnp.pad(query, ((0, 0), (0, 0), (0, 0), columns)),
    _padded_latents(kv_latent, columns),
    jnp.pad(
      topk_indices,
      ((0, 0), (0, 0), (0, -count % items.STEP_KEYS)),
      constant_values=-1,
    ),
    scale,
    padded_values,
    shares_rows,
  )
  return out[..., :value_dim], residuals._replace(
    mean_probs=residuals.mean_probs[:, :, :count]
  )


def _check(query, kv_latent, topk_indices, padded_width):
  expected = ["bfloat16", "bfloat16"]
  if isinstance(kv_latent, QuantizedLatents):
    _check_quantized(kv_latent)
    expected = ["bfloat16", "float8_e4m3fn", "bfloat16", "bfloat16"]
  dtypes = [x.dtype.name for x in jax.tree.leaves((query, kv_latent))]
  if dtypes != expected:
    raise NotImplementedError(
      f"needs query and latent in {' and '.join(expected)}: got"
      f" {' and '.join(dtypes)}"
    )
  if query.shape[2] > _MAX_HEADS:
    raise NotImplementedError(
      f"needs at most {_MAX_HEADS} heads: got {query.shape[2]}"
    )
  if padded_width > _MAX_WIDTH:
    raise NotImplementedError(
      f"holds rows of at most {_MAX_WIDTH} columns: got {query.shape[3]}, with"
      f" padding {padded_width}"
    )
  batch, num_keys, _ = kv_latent.shape
  count = math.prod(topk_indices.shape[:2]) * _round_up(
    topk_indices.shape[2], items.STEP_KEYS
  )
  if max(batch * num_keys, count) >= 1 << 31:
    raise NotImplementedError(
      "counts rows and indices in int32: got kv_latent.shape="
      f"{kv_latent.shape}, topk_indices.shape={topk_indices.shape}"
    )
  if not min(batch * num_keys, count):
    raise NotImplementedError(
      "needs a query, an index and a row: got kv_latent.shape="
      f"{kv_latent.shape}, topk_indices.shape={topk_indices.shape}"
    )


def _check_quantized(latents):
  value_dim, rest = latents.values.shape[-1], latents.rest.shape[-1]
  if value_dim % _QUANTIZED_MULTIPLE or not rest:
    raise NotImplementedError(
      f"needs QuantizedLatents of a multiple of {_QUANTIZED_MULTIPLE} values"
      f" and of other columns: got {value_dim} and {rest}"
    )


def _padded_latents(kv_latent, columns):
  if isinstance(kv_latent, QuantizedLatents):
    return kv_latent._replace(rest=_padded_latents(kv_latent.rest, columns))
  return jnp.pad(kv_latent, ((0, 0), (0, 0), columns))


def _head_tiles(heads):
  return -(-heads // items.ROWS)


def _round_up(x, multiple):
  return -(-x // multiple) * multiple


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(query, kv_latent, indices, scale, value_dim, shares_rows):
  """`sparse_mla` of padded columns and rows."""
  batch, num_queries, heads, width = query.shape
  _, num_keys, _ = kv_latent.shape
  tiles = _head_tiles(heads)
  multiprocessors = chip.chip().num_multiprocessors
  problem = items.Problem(
    batch=batch,
    num_queries=num_queries,
    num_keys=num_keys,
    heads=_round_up(heads, 8) if tiles == 1 else items.ROWS,
    head_tiles=tiles,
    width=width,
    value_dim=value_dim,
    count=indices.shape[2],
    scale=scale,
    num_multiprocessors=multiprocessors,
  )
  flat = (
    _whole_tiles(problem, query.reshape(-1, heads, width)),
    jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), kv_latent),
    indices.reshape(-1, problem.count),
  )
  share = queries_together(problem, heads) if shares_rows else 1
  if share > 1 and not isinstance(kv_latent, QuantizedLatents):
    out, log_sum_exp = _run_shared(problem, share, *flat)
  else:
    out, log_sum_exp = _run(problem, heads, *flat)
  sums = probs.call(problem, *flat, log_sum_exp)
  leading = (batch, num_queries)
  residuals = SparseMLAResiduals(
    log_sum_exp=log_sum_exp.reshape(*leading, heads),
    mean_probs=sums.sum(axis=0).reshape(*leading, -1) / heads,
  )
  return out.reshape(*leading, heads, value_dim), residuals


def _whole_tiles(problem, query):
  # A copy clips what is less than a tile, not what is less than two.
  if problem.head_tiles == 1:
    return query
  missing = problem.head_tiles * problem.heads - query.shape[1]
  return jnp.pad(query, ((0, 0), (0, missing), (0, 0)))


def _run(problem, num_heads, query, table, indices):
  """Output `[F, N, value_dim]` and log-sum-exp `[F, N]`, splits summed."""
  splits = choose_splits(
    problem.items, problem.steps, problem.num_multiprocessors
  )
  problem = problem.with_splits(splits)
  kernel = forward
  if splits == 1 and num_heads <= few_heads.MAX_HEADS:
    kernel = few_heads
  out, log_sum_exps = kernel.call(problem, query, table, indices)
  log_sum_exp = combine.log_sum_exp(problem, num_heads, log_sum_exps)
  if splits > 1:
    out = combine.call(problem, num_heads, out, log_sum_exps)
  return out[:, :num_heads], log_sum_exp


def queries_together(problem: items.Problem, num_heads: int) -> int:
  """Of how many queries that share rows the heads are one tile; 1: none share.

  Args:
    problem: of queries that do not.
    num_heads: of a query.
  """
  together = min(items.ROWS // num_heads, _MOST_TOGETHER)
  while together > 1:
    plan = shared_rows.Plan(together, problem.count)
    fits = (
      problem.num_keys <= shared_rows.most_rows(together)
      and 4 * plan.shared_words <= _SHARED_ROWS_BYTES
    )
    # Fewer queries than that are split over their rows.
    if fits and problem.flat_queries >= (
      together * problem.num_multiprocessors
    ):
      return together
    together -= 1
  return 1


def _run_shared(problem, share, query, table, indices):
  """As `_run`, `share` queries that follow each other as one."""
  num_heads, width = query.shape[1:]

  def by_batch(x, fill):
    x = x.reshape(problem.batch, problem.num_queries, *x.shape[1:])
    missing = -problem.num_queries % share
    widths = ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widths, constant_values=fill)

  def by_query(x):
    x = x.reshape(problem.batch, -1, num_heads, *x.shape[2:])
    return x[:, : problem.num_queries].reshape(-1, *x.shape[2:])

  query, indices = by_batch(query, 0), by_batch(indices, -1)
  groups = query.shape[1] // share
  entries, counts = shared_rows.call(indices.reshape(-1, problem.count), share)
  grouped = dataclasses.replace(
    problem,
    num_queries=groups,
    heads=share * num_heads,
    count=entries.shape[1],
    share=share,
  )
  out, log_sum_exp = forward.call(
    grouped,
    query.reshape(-1, grouped.heads, width),
    table,
    entries,
    counts,
  )
  return by_query(out), by_query(log_sum_exp[:, : grouped.heads])


def choose_splits(units: int, steps: int, multiprocessors: int) -> int:
  """The number of parts of each query's rows that takes the least time.

  Args:
    units: queries times tiles of heads.
    steps: of 128 rows, of a query.
    multiprocessors: of the chip.
  """

  def time(splits):
    waves = -(-units * splits // multiprocessors)
    steps_a_split = -(-steps // splits)
    work = waves * (steps_a_split + _ITEM_STEPS)
    if splits == 1:
      return work
    return work + _COMBINE_STEPS + _PART_STEPS * units * splits

  best = min(range(1, steps + 1), key=time)
  # As many parts as have a step each.
  return -(-steps // -(-steps // best))


def _forward(query, kv_latent, indices, scale, value_dim, shares_rows):
  arguments = jax.tree.map(
    lambda primal: primal.value, (query, kv_latent, indices)
  )
  out, residuals = _attend(*arguments, scale, value_dim, shares_rows)
  return (out, residuals), (*arguments, out, residuals.log_sum_exp)


def _backward(scale, value_dim, shares_rows, saved, grads):
  del shares_rows  # Of the forward pass alone.
  query, kv_latent, indices, out, log_sum_exp = saved
  if isinstance(kv_latent, QuantizedLatents):
    attend = functools.partial(
      reference.sparse_mla,
      kv_latent=kv_latent,
      topk_indices=indices,
      scale=scale,
      value_dim=value_dim,
    )
    return _quantized_backward(attend, query, grads), None, None
  grad_out, residuals = grads
  grad_query, grad_latent = backward.sparse_mla_backward(
    query,
    kv_latent,
    indices,
    out,
    log_sum_exp,
    jnp.zeros_like(out) if _is_zero(grad_out) else grad_out,
    _none_if_zero(residuals.log_sum_exp),
    _none_if_zero(residuals.mean_probs),
    scale=scale,
    value_dim=value_dim,
  )
  return grad_query, grad_latent, None


def _quantized_backward(attend, query, grads):
  """XLA's gradient of the queries."""
  grads = jax.tree.map(
    lambda grad: jnp.zeros(grad.shape, grad.dtype) if _is_zero(grad) else grad,
    grads,
    is_leaf=_is_zero,
  )
  _, vjp = jax.vjp(attend, query)
  return vjp(grads)[0]


def _is_zero(grad):
  return isinstance(grad, SymbolicZero)


def _none_if_zero(grad):
  return None if _is_zero(grad) else grad


_attend.defvjp(_forward, _backward, symbolic_zeros=True)
