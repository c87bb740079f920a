# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The notation of the whole project, stated once.

Letters in shapes, here and in `pallas_kernels`:
  B batch, T query tokens, S key tokens, N attention heads, I indexer heads,
  D indexer head dim, C latent width (kv_lora_rank + qk_rope_head_dim),
  V value width of the latent (kv_lora_rank), K index_topk, L layers,
  F full layers, H hidden size, Q query latent width (q_lora_rank).

Words: a *full* layer runs its indexer; a *shared* layer takes `topk_indices`
of its *source layer*, the nearest full layer before it, which *serves* it.
"""

from jaxtyping import Array, Float, Int32

Tokens = Int32[Array, "B T"]
Positions = Int32[Array, "B T"]
Hidden = Float[Array, "B T H"]
QueryLatent = Float[Array, "B T Q"]
KVLatent = Float[Array, "B S C"]
IndexKeys = Float[Array, "B S D"]
TopkIndices = Int32[Array, "B T K"]
KeyBounds = Int32[Array, "B T"]
