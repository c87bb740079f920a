# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The small model that comes with the package."""

import pathlib


def embedded_checkpoint() -> pathlib.Path:
  """Folder of the embedded checkpoint, for `load_checkpoint`.

  A byte-level DSA language model, preset `small`: 12 full layers, 5.5M
  parameters in bfloat16 (11 MB), `index_topk` 32, trained at a context of 1024
  on the Python standard library's source with facts hidden in it.
  `results/embedded_model` says how it was made and what it can do.
  """
  return pathlib.Path(__file__).parent / "data" / "small"
