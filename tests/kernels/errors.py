# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs a call without the shape checks that only the tests have."""

import contextlib

import jaxtyping


@contextlib.contextmanager
def unchecked():
  """Lets a bad argument reach the library's own checks."""
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    yield
  finally:
    jaxtyping.config.update("jaxtyping_disable", False)
