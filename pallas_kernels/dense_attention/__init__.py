# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of dense MLA: the teacher of the indexer's warm-up."""
