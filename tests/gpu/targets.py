# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The H200 as a compiler's target, on a machine without a GPU."""

import functools
import os

# Before jax is imported: starting the plugin would look for a driver.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}

# XLA's description of the device (`GpuTargetConfigProto`); sm_90a, for wgmma
# and register reallocation, is the feature extension.
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  model_str: "sm_9.0a"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  name: "NVIDIA H200"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def set_environment():
  """Sets what must stand before jax is imported."""
  os.environ.update(ENVIRONMENT)


@functools.cache
def device():
  """A device that compiles and cannot run."""
  from jax.experimental import topologies

  return topologies.get_topology_desc(
    platform="cuda", target_config=_TARGET, topology="1x1x1"
  ).devices[0]


def compile_for_h200(function, *arguments):
  """Compiles `function` through ptxas as if an H200 were there.

  Args:
    function: of `arguments`; may call ops with implementation "mosaic_gpu".
    *arguments: trees of arrays or `jax.ShapeDtypeStruct`.

  Returns:
    What `jax.jit(function).lower(...).compile()` returns.
  """
  import jax
  from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

  sharding = SingleDeviceSharding(device())
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    arguments,
  )
  # `hopper.chip` asks the mesh.
  kind = AbstractDevice("NVIDIA H200", None, "cuda")
  mesh = AbstractMesh((), (), abstract_device=kind)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(function).trace(*arguments).lower().compile()
