# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernels of sparse attention with index reuse: arrays in, arrays out.

Each op is a folder with the same files: `api.py` (the public function and its
checks), `reference.py` (the definition, in plain XLA), one file for each
further lowering, `shapes.py` (the shapes of real models). Letters in shapes:
  B batch, T query tokens, S key tokens, N attention heads, I indexer heads,
  D indexer head dim, C latent width, V value width, K index_topk.
"""

from pallas_kernels.dense_attention.api import dense_mla_residuals
from pallas_kernels.expert_mlp.api import expert_mlp
from pallas_kernels.expert_mlp.shared import SharedExpert
from pallas_kernels.grouped.api import grouped_matmul
from pallas_kernels.indexer.api import (
  indexer_scores,
  indexer_topk,
  selected_indexer_scores,
)
from pallas_kernels.indexer.quantization import quantize_rows
from pallas_kernels.sparse_attention import packing
from pallas_kernels.sparse_attention.api import (
  SparseMLAResiduals,
  sparse_mla,
  sparse_mla_packed,
)
from pallas_kernels.sparse_attention.packing import PackedLatent
from pallas_kernels.sparse_attention.quantization import (
  QuantizedLatents,
  dequantize_latents,
  quantize_latents,
)
from pallas_kernels.topk.api import top_k

__all__ = [
  "PackedLatent",
  "QuantizedLatents",
  "SharedExpert",
  "SparseMLAResiduals",
  "dense_mla_residuals",
  "dequantize_latents",
  "expert_mlp",
  "grouped_matmul",
  "indexer_scores",
  "indexer_topk",
  "packing",
  "quantize_latents",
  "quantize_rows",
  "selected_indexer_scores",
  "sparse_mla",
  "sparse_mla_packed",
  "top_k",
]
