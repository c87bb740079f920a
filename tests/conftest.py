# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks every jaxtyping annotation of both packages while the tests run."""

import os

import jaxtyping

if os.environ.get("JAX_PLATFORMS") == "cpu":
  # Most of a test's time is LLVM's; level 0 halves it. XLA's own passes, which
  # decide the order of sums, are the same.
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
  )

jaxtyping.install_import_hook(
  ["indexcache_jax", "pallas_kernels"], "beartype.beartype"
)
