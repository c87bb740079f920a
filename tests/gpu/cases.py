# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is compiled for the H200: a function of cases for each op."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

# Each has `cases()` in tests/gpu/<op>_cases.py.
OPS = (
  "topk",
  "indexer",
  "selected_scores",
  "dense_attention",
  "sparse_mla",
  "sparse_mla_backward",
  "grouped",
  "expert_mlp",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One call of one op.

  Attributes:
    op: a name of `OPS`.
    name: the model, the phase and the number of keys.
    function: of the arguments; with the implementation named.
    arguments: `jax.ShapeDtypeStruct`s.
    temp_bytes: the most that the compiled call may hold beside its arguments
      and results.
    subset: whether CI compiles it.
    spill_bytes: the most that a kernel may spill: 0 in all but JAX's own.
  """

  op: str
  name: str
  function: Callable
  arguments: Sequence[Any]
  temp_bytes: int = 1 << 30
  subset: bool = False
  spill_bytes: int = 0


def all_cases(ops: Sequence[str] = OPS) -> list[Case]:
  """Cases of the named ops, in the order of their files."""
  return [
    case
    for op in ops
    for case in importlib.import_module(f"tests.gpu.{op}_cases").cases()
  ]
