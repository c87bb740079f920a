# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the TPU kernels ask about their chip, and their way to several."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, PyTree


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


class Split(NamedTuple):
  """One way to share a call among devices.

  Attributes:
    arguments: the axis of each argument that is cut; None: whole everywhere.
    results: the axis of each result, a tree like the results.
  """

  arguments: tuple[int | None, ...]
  results: PyTree[int]


def over_devices(
  function: Callable, arguments: Sequence[Array], splits: Sequence[Split]
) -> PyTree[Array]:
  """Calls a function of kernels on every device of its arguments' mesh.

  XLA refuses to partition a kernel, so its call says how it is shared.

  Args:
    function: of the arguments, or of equal parts of them.
    arguments: arrays whose sharding XLA chooses ("auto" axes).
    splits: the first whose axes the devices divide is taken; if none, every
      device does the whole work.

  Returns:
    The results; on one device, or inside a `shard_map`, of a plain call.
  """
  mesh = _mesh_of(arguments)
  if mesh is None:
    return function(*arguments)

  def spec(axis):
    if axis is None:
      return jax.sharding.PartitionSpec()
    return jax.sharding.PartitionSpec(*[None] * axis, mesh.axis_names)

  def fits(split):
    return all(
      axis is None or x.shape[axis] % mesh.size == 0
      for x, axis in zip(arguments, split.arguments, strict=True)
    )

  whole = Split((None,) * len(arguments), None)
  split = next(filter(fits, splits), whole)
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=tuple(map(spec, split.arguments)),
    out_specs=jax.tree.map(spec, split.results, is_leaf=lambda x: x is None),
    # A kernel does not say along which axes its results differ.
    check_vma=False,
  )(*arguments)


def _mesh_of(arguments):
  """The mesh of several devices that the arguments are on, if any."""
  for x in arguments:
    mesh = jax.typeof(x).sharding.mesh
    if mesh.size > 1 and not mesh.manual_axes:
      return mesh
  return None
