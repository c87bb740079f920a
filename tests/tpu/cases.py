# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is compiled and costed: a function of cases for each op."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

# Each has `cases()`; a file that is not there yet is passed over.
OPS = ("topk", "indexer", "sparse_mla", "model")


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
    cache: as it lies on one device; an array of its dtype and of as many
      elements must not be copied, for that is a second cache, made anew at
      each call.
    donated: places of arguments whose memory the results take over.
    num_chips: of the topology: 1, or 4 as 2 x 2.
    shardings: of the arguments on given devices; None: one device.
    subset: whether CI compiles it.
    cost: whether the schedule is costed too. The profiler writes down every
      executed instruction, so such a case has few grid steps.
    kernels: names of its Pallas calls, each of which must be in the compiled
      call and, where that is costed, get a figure.
    hbm_bytes: the least bytes that the call must move.
    mxu_flops: of its matrix products.
    contraction: their contracted width, where it is below a matrix unit's.
    issue_cycles: the least cycles of issue where that, not bytes, is the
      floor: say of one address a gathered row. `None`: not a floor here.
    rejected_on: chips where the call must raise NotImplementedError.
    note: of the table.
  """

  op: str
  name: str
  function: Callable
  arguments: Sequence[Any]
  temp_bytes: int = 1 << 30
  cache: Any = None
  donated: Sequence[int] = ()
  num_chips: int = 1
  shardings: Callable | None = None
  subset: bool = False
  cost: bool = False
  kernels: Sequence[str] = ()
  hbm_bytes: int = 0
  mxu_flops: int = 0
  contraction: int = 0
  issue_cycles: int | None = None
  rejected_on: Sequence[str] = ()
  note: str = ""


def all_cases(ops: Sequence[str] = OPS) -> list[Case]:
  """Cases of the named ops, in the order of their files."""
  found = []
  for op in ops:
    name = f"tests.tpu.{op}_cases"
    if importlib.util.find_spec(name) is None:
      print(f"no {name}: {op} is left out")
      continue
    found.extend(importlib.import_module(name).cases())
  return found
