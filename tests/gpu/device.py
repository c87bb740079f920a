# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a device test can run here."""

import unittest

from pallas_kernels.hopper import chip


def require_hopper():
  """Skips the module, for `setUpModule`, where there is no Hopper GPU."""
  try:
    chip.chip()
  except NotImplementedError as reason:
    raise unittest.SkipTest(str(reason)) from None
