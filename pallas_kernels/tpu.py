# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the TPU kernels ask about their chip."""

from typing import NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu


class Chip(NamedTuple):
  """Limits of one TensorCore.

  Attributes:
    name: for messages.
    vmem_bytes: of a core.
    num_cores: cores that one kernel's parallel grid dimension shares.
    has_float8: whether the matrix units take float8_e4m3fn.
  """

  name: str
  vmem_bytes: int
  num_cores: int
  has_float8: bool

  @property
  def vmem_limit_bytes(self) -> int:
    """What a kernel may ask for; the compiler keeps a little itself."""
    return self.vmem_bytes * 7 // 8


# The oldest generation that the kernels are compiled for.
_OLDEST = 5


def chip() -> Chip:
  """The chip of the default device or of the abstract mesh in use.

  Raises:
    NotImplementedError: no TPU, or one before v5.
  """
  try:
    info = pltpu.get_tpu_info()
  except ValueError:
    raise NotImplementedError(
      f"the TPU kernels need a TPU: got the platform {jax.default_backend()!r}"
    ) from None
  if info.generation < _OLDEST:
    raise NotImplementedError(
      f"the TPU kernels are compiled for v5e, v5p, v6e and 7x: got"
      f" {info.chip_version}"
    )
  return Chip(
    str(info.chip_version),
    info.vmem_capacity_bytes,
    info.num_cores,
    info.is_matmul_supported("float8_e4m3fn", "float8_e4m3fn"),
  )
