# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels ask about their chip."""

from typing import NamedTuple

import jax

# Shared memory that one block may use (CUDA programming guide, table of
# compute capabilities: 227 KiB).
SMEM_BYTES = 232448
_KINDS = ("H100", "H200", "H800", "H20", "GH200")
# Of every SXM part. PCIe parts have 114: the default device says so itself.
_MULTIPROCESSORS = 132


class Chip(NamedTuple):
  """A Hopper GPU.

  Attributes:
    name: for messages.
    num_multiprocessors: blocks of a persistent kernel's grid.
  """

  name: str
  num_multiprocessors: int


def chip() -> Chip:
  """The default device's chip, or that of the abstract mesh in use.

  Raises:
    NotImplementedError: no Hopper GPU.
  """
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    name, multiprocessors = abstract.device_kind, _MULTIPROCESSORS
  else:
    device = jax.devices()[0]
    name = device.device_kind
    multiprocessors = getattr(device, "core_count", None) or _MULTIPROCESSORS
  if not any(kind in name.split() for kind in _KINDS):
    raise NotImplementedError(
      f"the GPU kernels are compiled for Hopper ({', '.join(_KINDS)}): got"
      f" {name}"
    )
  return Chip(name, multiprocessors)
