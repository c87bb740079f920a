# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scripts, one claim each: flags, a frozen config, the library, a report."""
