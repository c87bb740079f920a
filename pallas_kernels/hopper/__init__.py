# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What Pallas lacks on Hopper GPUs, behind plain interfaces.

The only modules that touch JAX's private MLIR: everything that a kernel writes
through `plgpu.inline_mgpu` is here.
"""
