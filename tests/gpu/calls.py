# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small calls of every kernel, for tools that run each many times or slowly."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels.hopper import row_sums
from tests.gpu import hopper_kernels


def _normal(seed, *shape, dtype=jnp.bfloat16):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def _indices(queries, num_keys, k):
  rng = np.random.default_rng(0)
  rows = [np.sort(rng.permutation(num_keys)[:k]) for _ in range(queries)]
  indices = np.stack(rows).astype(np.int32)
  indices[:, -k // 8 :] = -1
  return jnp.asarray(indices)


def _bounds(batch, queries, num_keys):
  end = num_keys - queries + 1 + jnp.arange(queries, dtype=jnp.int32)
  end = jnp.broadcast_to(end, (batch, queries))
  return jnp.zeros_like(end), end


def _top_k():
  scores = _normal(0, 264, 20000, dtype=jnp.float32)
  scores = scores.at[::2].set(jnp.round(scores[::2]))
  return lambda x: pk.top_k(x, 512), (scores,)


def _top_k_few_rows():
  """Rows that several blocks share, so that a second kernel merges."""
  scores = _normal(0, 2, 32768, dtype=jnp.float32)
  scores = scores.at[0].set(jnp.round(scores[0]))
  return lambda x: pk.top_k(x, 512), (scores,)


def _indexer(batch, queries, num_keys, dtype):
  index_q, index_k = (
    _normal(0, batch, queries, 32, 128),
    _normal(1, batch, num_keys, 128),
  )
  weights = _normal(2, batch, queries, 32, dtype=jnp.float32)
  return (
    lambda *args: pk.indexer_topk(*args, k=512),
    (
      index_q.astype(dtype),
      index_k.astype(dtype),
      weights,
      *_bounds(batch, queries, num_keys),
    ),
  )


def _indexer_scaled(batch, queries, num_keys):
  _, (index_q, index_k, weights, *bounds) = _indexer(
    batch, queries, num_keys, jnp.bfloat16
  )
  index_q, scale = pk.quantize_rows(index_q)
  index_k, key_scale = pk.quantize_rows(index_k)

  def select(*args):
    *args, key_scale = args
    return pk.indexer_topk(*args, k=512, key_scale=key_scale)

  return select, (index_q, index_k, weights * scale, *bounds, key_scale)


def _indexer_scores():
  _, args = _indexer(1, 64, 4096, jnp.bfloat16)
  return pk.indexer_scores, args


def _attend(query, kv_latent, indices, shares_rows=False):
  return pk.sparse_mla(
    query,
    kv_latent,
    indices,
    scale=0.05,
    value_dim=512,
    return_residuals=True,
    shares_rows=shares_rows,
  )


def _sparse_mla(batch, queries, heads, width=576):
  indices = _indices(batch * queries, 4096, 512)
  return _attend, (
    _normal(0, batch, queries, heads, width),
    _normal(1, batch, 4096, width),
    indices.reshape(batch, queries, -1),
  )


def _sparse_mla_shared_rows():
  """Of 3 queries; each selects a part of the same 600 rows or so."""
  _, (query, kv_latent, _) = _sparse_mla(1, 400, 20)
  rng = np.random.default_rng(0)
  rows = np.sort(rng.permutation(4096)[:600])
  chosen = np.sort(rng.random((1, 400, 600)).argsort(axis=-1)[..., :512])
  indices = rows[chosen].astype(np.int32)
  indices[..., -64:] = -1
  return functools.partial(_attend, shares_rows=True), (
    query,
    kv_latent,
    jnp.asarray(indices),
  )


def _sparse_mla_float8(batch, queries, heads):
  _, (query, kv_latent, indices) = _sparse_mla(batch, queries, heads)
  return _attend, (query, pk.quantize_latents(kv_latent, 512), indices)


def _gradients(query, kv_latent, indices, grad):
  _, vjp = jax.vjp(lambda *args: _attend(*args, indices)[0], query, kv_latent)
  return vjp(grad)


def _sparse_mla_backward(batch, queries, heads):
  _, args = _sparse_mla(batch, queries, heads)
  return _gradients, (*args, _normal(2, batch, queries, heads, 512))


def _sparse_mla_backward_in_chunks():
  """Two chunks of each sequence, the second one of fewer queries.

  Chunks of the real size hold hundreds of MiB.
  """
  _, args = _sparse_mla_backward(2, 100, 64)
  _, kv_latent, indices, _ = args
  keys, width = kv_latent.shape[1:]
  sizes = row_sums.Sizes(1, 1, keys, indices.shape[-1], width, 1)

  def gradients(*args):
    with mock.patch.object(row_sums, "CHUNK_BYTES", 67 * sizes.item_bytes):
      return _gradients(*args)

  return gradients, args


def _selected_scores():
  indices = _indices(132, 4096, 512)[None]

  def run(index_q, index_k, weights):
    scores, vjp = jax.vjp(
      lambda *args: pk.selected_indexer_scores(*args, indices),
      index_q,
      index_k,
      weights,
    )
    return scores, vjp(jnp.ones_like(scores))

  return run, (
    _normal(0, 1, 132, 32, 128),
    _normal(1, 1, 4096, 128),
    _normal(2, 1, 132, 32, dtype=jnp.float32),
  )


def _dense_attention():
  return lambda *args: pk.dense_mla_residuals(*args, scale=0.05), (
    _normal(0, 1, 64, 20, 576),
    _normal(1, 1, 2048, 576),
    *_bounds(1, 64, 2048),
  )


def _grouped_gradient():
  """That of the rows: the kernel of transposed matrices."""
  _, (rows, matrices, sizes) = _grouped(300)

  def gradient(rows, matrices, sizes, grad):
    _, vjp = jax.vjp(lambda x: pk.grouped_matmul(x, matrices, sizes), rows)
    return vjp(grad)

  return gradient, (rows, matrices, sizes, _normal(2, 300, 256))


def _grouped(num_rows):
  sizes = np.bincount(
    np.random.default_rng(0).integers(0, 16, num_rows), minlength=16
  )
  return pk.grouped_matmul, (
    _normal(0, num_rows, 512),
    _normal(1, 16, 512, 256),
    jnp.asarray(sizes, jnp.int32),
  )


def _expert_mlp(num_rows):
  gate, up, down = _normal(0, 3, 16, 512, 512)
  shared = pk.SharedExpert(*_normal(2, 3, 512, 512))
  experts = jnp.arange(num_rows * 4, dtype=jnp.int32).reshape(-1, 4) % 16
  return pk.expert_mlp, (
    _normal(1, num_rows, 512),
    experts,
    jnp.ones(experts.shape),
    *(gate, up, down, shared),
  )


def _named_barriers():
  """No op: what a tool says of the least kernel that hands something over."""
  call = functools.partial(hopper_kernels.hand_over, blocks=128)
  return call, (_normal(0, 4, 64, dtype=jnp.float32),)


# A function and its arguments, made when it is called.
CALLS = {
  "top_k": _top_k,
  "top_k few rows": _top_k_few_rows,
  "indexer_scores": _indexer_scores,
  "indexer_topk prefill": lambda: _indexer(1, 256, 4096, jnp.bfloat16),
  "indexer_topk prefill fp8": lambda: _indexer(1, 256, 4096, jnp.float8_e4m3fn),
  "indexer_topk prefill fp8 scaled": lambda: _indexer_scaled(1, 256, 4096),
  "indexer_topk decode": lambda: _indexer(8, 1, 8192, jnp.bfloat16),
  "indexer_topk decode fp8": lambda: _indexer(8, 1, 32768, jnp.float8_e4m3fn),
  "indexer_topk decode fp8 scaled": lambda: _indexer_scaled(8, 1, 8192),
  "sparse_mla prefill": lambda: _sparse_mla(1, 264, 64),
  "sparse_mla 128 heads": lambda: _sparse_mla(1, 132, 128),
  "sparse_mla 20 heads": lambda: _sparse_mla(1, 264, 20),
  "sparse_mla shared rows": _sparse_mla_shared_rows,
  "sparse_mla 512 columns": lambda: _sparse_mla(1, 132, 64, width=512),
  "sparse_mla decode": lambda: _sparse_mla(8, 1, 64),
  "sparse_mla float8": lambda: _sparse_mla_float8(1, 264, 64),
  "sparse_mla float8 20 heads": lambda: _sparse_mla_float8(1, 264, 20),
  "sparse_mla float8 decode": lambda: _sparse_mla_float8(8, 1, 64),
  "sparse_mla backward": lambda: _sparse_mla_backward(1, 132, 64),
  "sparse_mla backward in chunks": _sparse_mla_backward_in_chunks,
  "selected_indexer_scores": _selected_scores,
  "dense_mla_residuals": _dense_attention,
  "grouped_matmul": lambda: _grouped(300),
  "grouped_matmul gradient": _grouped_gradient,
  "expert_mlp decode": lambda: _expert_mlp(4),
  "named barriers": _named_barriers,
}


def check(names: list[str]):
  """Raises ValueError where a name is none of `CALLS`."""
  unknown = [name for name in names if name not in CALLS]
  if unknown:
    raise ValueError(f"`--calls` must be among {list(CALLS)}: got {unknown}.")
