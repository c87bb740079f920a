# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention to selected rows, and its gradient."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from experiments.kernel_workloads import base

# Batch, queries, keys, heads.
_SPARSE_MLA = {
  "4096x32768 128 heads": (1, 4096, 32768, 128),
  "4096x32768 64 heads": (1, 4096, 32768, 64),
  "4096x32768 32 heads": (1, 4096, 32768, 32),
  "4096x32768 20 heads": (1, 4096, 32768, 20),
  "4096x131072 128 heads": (1, 4096, 131072, 128),
  "4096x131072 64 heads": (1, 4096, 131072, 64),
  "4096x131072 32 heads": (1, 4096, 131072, 32),
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
# Of them, those whose queries share half their rows, too: alone, together.
_SHARED_ROWS = ("4096x131072 20 heads", "4096x131072 32 heads")
# Queries, keys, heads.
_BACKWARD = (
  (2048, 8192, 64),
  (2048, 8192, 128),
  (2048, 131072, 64),
  (2048, 1048576, 64),
)


def _mla_inputs(key, batch, num_queries, num_keys, heads, is_float8=False):
  keys = jax.random.split(key, 3)
  kv_latent = base.normal(keys[1], (batch, num_keys, 576))
  if is_float8:
    # A sequence at a time, lest float32 copies of the largest caches are made.
    kv_latent = jax.jit(
      lambda kv: jax.lax.map(lambda row: pk.quantize_latents(row, 512), kv)
    )(kv_latent)
  return (
    base.normal(keys[0], (batch, num_queries, heads, 576)),
    kv_latent,
    base.selection(keys[2], batch, num_queries, num_keys, 2048),
  )


def _attend(query, kv_latent, topk_indices, **kwargs):
  return pk.sparse_mla(
    query,
    kv_latent,
    topk_indices,
    scale=base.SCALE,
    value_dim=512,
    **kwargs,
  )


def _shared_inputs(key, num_queries, num_keys, heads):
  """Of queries in groups, whose rows are together half of what each has."""
  key, chosen = jax.random.split(key)
  query, kv_latent, _ = _mla_inputs(key, 1, num_queries, num_keys, heads)
  together = 64 // heads
  groups = -(-num_queries // together)
  of_a_group = 2048 * together // 2
  rows = base.selection(key, 1, groups, num_keys, of_a_group)[0, :, None]
  order = jax.random.uniform(chosen, (groups, together, of_a_group))
  places = jnp.sort(jnp.argsort(order, axis=-1)[..., :2048], axis=-1)
  indices = jnp.take_along_axis(rows, places, axis=-1).reshape(1, -1, 2048)
  return query, kv_latent, indices[:, :num_queries]


def sparse_mla() -> list[base.Workload]:
  """Prefill and decoding, in bfloat16 and with float8 latents."""

  def check(args, out):
    query, kv_latent, topk_indices = args
    few = slice(-base.CHECKED, None)
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
    return base.relative_error(out[:, few], expected.reshape(out[:, few].shape))

  workload = functools.partial(
    base.Workload,
    op="sparse_mla",
    error=check,
    tolerance=4e-3,
    unit="TFLOP/s",
    ceiling="bfloat16",
  )
  names = [(name, False) for name in _SPARSE_MLA]
  names += [(name, True) for name in _FLOAT8_LATENTS]
  plain = [
    workload(
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
      work=_work(batch * queries, heads),
    )
    for name, is_float8 in names
    for batch, queries, num_keys, heads in (_SPARSE_MLA[name],)
  ]
  shared = [
    workload(
      name=f"{name}, half shared, {'together' if shares_rows else 'alone'}",
      make=functools.partial(
        _shared_inputs, num_queries=queries, num_keys=num_keys, heads=heads
      ),
      function=functools.partial(_attend, shares_rows=shares_rows),
      work=_work(queries, heads),
    )
    for name in _SHARED_ROWS
    for _, queries, num_keys, heads in (_SPARSE_MLA[name],)
    for shares_rows in (False, True)
  ]
  return plain + shared


def _work(queries, heads):
  return 2 * queries * heads * 2048 * (576 + 512)


def sparse_mla_backward() -> list[base.Workload]:
  """The gradient of a training step's queries, up to a million keys."""

  def make(key, queries, num_keys, heads):
    query, kv_latent, selected = _mla_inputs(key, 1, queries, num_keys, heads)
    out, vjp = base.pull_back(
      lambda q, kv: _attend(q, kv, selected), query, kv_latent
    )
    return vjp, base.normal(key, out.shape), query, kv_latent, selected

  def check(args, out):
    _, grad, query, kv_latent, selected = args
    few = 64
    # The gradient of the rows sums over queries, so these are all there are.
    grads = [
      base.pull_back(
        lambda q, kv, i=implementation: _attend(
          q, kv, selected[:, :few], implementation=i
        ),
        query[:, :few].astype(dtype),
        kv_latent.astype(dtype),
      )[1](grad[:, :few].astype(dtype))
      for implementation, dtype in ((None, jnp.bfloat16), ("xla", jnp.float32))
    ]
    errors = [base.relative_error(a, b) for a, b in zip(*grads, strict=True)]
    return max(*errors, base.relative_error(out[0][:, :few], grads[1][0]))

  return [
    base.Workload(
      op="sparse_mla_backward",
      name=f"{queries}x{num_keys} {heads} heads",
      make=functools.partial(
        make, queries=queries, num_keys=num_keys, heads=heads
      ),
      function=lambda vjp, grad, *_: vjp(grad),
      error=check,
      tolerance=8e-3,
      work=2 * queries * heads * 2048 * (3 * 576 + 2 * 512),
      unit="TFLOP/s",
      ceiling="bfloat16",
    )
    for queries, num_keys, heads in _BACKWARD
  ]
