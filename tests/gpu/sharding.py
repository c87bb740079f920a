# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The device tests of each op, divided among processes."""

import importlib.util
from typing import NamedTuple

from tests.gpu import cases

# Processes that share a module's tests, so that each takes half a minute; of
# the others, one. Those that take longest first, lest one is left alone at the
# end.
_SHARDS = {
  "sparse_mla_device_test": 3,
  "sparse_mla_float8_test": 3,
  "indexer_device_test": 3,
  "sparse_mla_backward_device_test": 2,
  "indexer_generated_test": 2,
  "sparse_mla_generated_test": 2,
  "dense_attention_device_test": 1,
  "dense_attention_generated_test": 1,
  "sparse_mla_backward_generated_test": 1,
  "topk_generated_test": 1,
}


# Of each op, those that there are: the op's contract, drawn cases, and cases of
# float8 latents.
_KINDS = ("device", "generated", "float8")
# What has device tests: what the kernels are made of, the ops, the choice among
# their implementations, training, and generation with the embedded model.
TESTED = ("hopper", *cases.OPS, "dispatch", "training", "generation")


class Shard(NamedTuple):
  """Some of a module's tests.

  Attributes:
    module: its name in this package.
    index: of the shard.
    total: shards of the module.
  """

  module: str
  index: int
  total: int


def shards(ops: list[str]) -> list[Shard]:
  """All tests of some ops, in the order in which to start them.

  Raises:
    ValueError: an op without tests.
  """
  modules = []
  for op in ops:
    found = [
      f"{op}_{kind}_test"
      for kind in _KINDS
      if importlib.util.find_spec(f"tests.gpu.{op}_{kind}_test")
    ]
    if not found:
      raise ValueError(f"`--ops` must be among {TESTED}: got {op!r}.")
    modules += found
  order = list(_SHARDS)
  modules.sort(key=lambda x: order.index(x) if x in order else len(order))
  return [
    Shard(module, index, total)
    for module in modules
    for total in (_SHARDS.get(module, 1),)
    for index in range(total)
  ]
