# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters over several devices, for checkpoints larger than one."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def parameter_shardings(
  shapes: dict[str, Any], devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
  """Splits each parameter along its largest axis that the devices divide.

  For `load_checkpoint(sharding=...)`. The model itself knows nothing of it:
  XLA inserts the gathers and sums where a computation needs them, so results
  differ from one device's by the order of summation. Of axes of equal size
  the first is split; a parameter without such an axis is on every device.

  Args:
    shapes: nested dict of anything with a `shape`, such as
      `jax.eval_shape(model.init, key, tokens)["params"]`.
    devices: to spread over; None: all.

  Returns:
    Nested dict of `jax.sharding.NamedSharding`, of the structure of `shapes`.
  """
  devices = jax.devices() if devices is None else devices
  if not devices:
    raise ValueError(
      "`devices` must name at least one device: got none. None means all."
    )
  mesh = jax.sharding.Mesh(
    np.asarray(devices),
    ("devices",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  return jax.tree.map(
    lambda leaf: jax.sharding.NamedSharding(
      mesh, _partition(leaf.shape, len(devices))
    ),
    shapes,
  )


def _partition(shape, num_devices) -> jax.sharding.PartitionSpec:
  axes = [axis for axis, size in enumerate(shape) if size % num_devices == 0]
  if not axes:
    return jax.sharding.PartitionSpec()
  largest = max(axes, key=lambda axis: shape[axis])
  return jax.sharding.PartitionSpec(*[None] * largest, "devices")
