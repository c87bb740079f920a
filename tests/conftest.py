# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks every jaxtyping annotation of both packages while the tests run."""

import jaxtyping

jaxtyping.install_import_hook(
  ["indexcache_jax", "pallas_kernels"], "beartype.beartype"
)
