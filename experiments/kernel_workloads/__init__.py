# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `bench_kernels` runs: calls of the ops at real shapes, with a check."""

from experiments.kernel_workloads import (
  distillation,
  experts,
  indexer,
  sparse_mla,
  topk,
)
from experiments.kernel_workloads.base import Workload

__all__ = ["Workload", "workloads"]


def workloads() -> list[Workload]:
  """Every workload, in the order of the table."""
  return [
    *topk.top_k(),
    *indexer.indexer_scores(),
    *indexer.indexer_topk(),
    *sparse_mla.sparse_mla(),
    *sparse_mla.sparse_mla_backward(),
    *distillation.selected_scores(),
    *distillation.dense_attention(),
    *experts.expert_mlp(),
  ]
