# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a mixture, from routing to weighted sum."""
