# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The chips that the kernels are compiled for, none of them present."""

import dataclasses
import os
import re

# Before jax is imported: no TPU is looked for, no machine asked for metadata,
# several processes may load the compiler at once.
ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_PLATFORMS": "cpu",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One chip as the compiler names it.

  Attributes:
    topology: for `topologies.get_topology_desc`: one chip, one host.
    topology_of_4: of 2 x 2 chips.
    clock: in Hz. v5e and v5p follow from the published peak (matrix units
      x 128^2 x 2 x clock); v6e and 7x are inferred from theirs, under the
      assumption of matrix units at twice the rate.
    devices: JAX devices a chip: 7x shows its two cores as two.
  """

  topology: str
  topology_of_4: str
  clock: float
  devices: int = 1


CHIPS = {
  "v5e": Chip(topology="v5e:1x1", topology_of_4="v5e:2x2", clock=1.5e9),
  "v5p": Chip(topology="v5p:1x1x1", topology_of_4="v5p:2x2x1", clock=1.75e9),
  "v6e": Chip(topology="v6e:1x1", topology_of_4="v6e:2x2", clock=1.75e9),
  "7x": Chip(
    topology="tpu7x:1x1x1", topology_of_4="tpu7x:2x2x1", clock=2.2e9, devices=2
  ),
}


def device(chip: str):
  """The chip's first device, which compiles and cannot run."""
  from jax.experimental import topologies

  return topologies.get_topology_desc(
    platform="tpu",
    topology_name=CHIPS[chip].topology,
    chips_per_host_bounds=(1, 1, 1),
  ).devices[0]


def lower_case(case, chip: str):
  """Lowers a case's function as if its chip, or chips, were there.

  Args:
    case: a `cases.Case`.
    chip: a name of `CHIPS`.

  Returns:
    What `jax.jit(function).lower` returns; its `compile` runs the TPU's own
    compiler.
  """
  import jax
  from jax.experimental import topologies
  from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

  function = jax.jit(case.function, donate_argnums=tuple(case.donated))
  if case.num_chips > 1:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=CHIPS[chip].topology_of_4
    ).devices
    shardings = case.shardings(case.arguments, devices)
    # Each argument's mesh names the chip, so no other mesh is in use.
    return function.trace(*_place(case.arguments, shardings)).lower()
  one = device(chip)
  shardings = jax.tree.map(lambda _: SingleDeviceSharding(one), case.arguments)
  # `pltpu.get_tpu_info` asks the mesh for its chip.
  kind = AbstractDevice(one.device_kind, one.num_cores, "tpu")
  mesh = AbstractMesh((), (), abstract_device=kind)
  with jax.sharding.use_abstract_mesh(mesh):
    return function.trace(*_place(case.arguments, shardings)).lower()


def _place(arguments, shardings):
  import jax

  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    tuple(arguments),
    tuple(shardings),
  )


def info(device):
  """`TpuInfo` of a device: bandwidth and peak rates, each a core's."""
  # No public function takes a device that is not there.
  from jax._src import tpu_info

  version = tpu_info.chip_version_from_device_kind(device.device_kind)
  return tpu_info.get_tpu_info_for_chip(version, device.num_cores)


def set_environment(log_dir: str):
  """Sets the variables above; a crash writes 140 MB to `log_dir`."""
  os.environ.update(ENVIRONMENT, TPU_LOG_DIR=log_dir)
  # It would win over this environment's own compiler.
  os.environ.pop("TPU_LIBRARY_PATH", None)


# How a compiled module's text calls a dtype.
HLO_NAMES = {
  "bfloat16": "bf16",
  "float32": "f32",
  "float8_e4m3fn": "f8e4m3fn",
  "uint32": "u32",
}
_SHAPE = re.compile(r"= *(\w+)\[([\d,]*)\]\S* copy(?:-start)?\(")


def copies(text: str) -> list[tuple[str, tuple[int, ...]]]:
  """Dtype and shape of each array that a compiled module copies."""
  return [
    (dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in _SHAPE.findall(text)
  ]
