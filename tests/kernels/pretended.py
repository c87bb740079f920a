# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A GPU that is not there: the library chooses for it, and traces."""

import contextlib
import types
from collections.abc import Iterator
from unittest import mock

import jax

from pallas_kernels import dispatch
from pallas_kernels.hopper import chip


@contextlib.contextmanager
def gpu(kind: str, multiprocessors: int = 132) -> Iterator[None]:
  """Lets the ops take the default device for a GPU of this kind."""
  device = types.SimpleNamespace(device_kind=kind, core_count=multiprocessors)
  # Of these modules alone: JAX itself must know where it is.
  with (
    mock.patch.object(
      chip,
      "jax",
      types.SimpleNamespace(sharding=jax.sharding, devices=lambda: [device]),
    ),
    mock.patch.object(
      dispatch, "jax", types.SimpleNamespace(default_backend=lambda: "gpu")
    ),
  ):
    yield


@contextlib.contextmanager
def choices() -> Iterator[dict[str, tuple[str, str]]]:
  """Fills a dictionary: op -> what it ran as, and why not as the others.

  By what `dispatch` logs, which it does once a process.
  """
  found = {}

  def record(op, name, reasons):
    found[op] = (name, reasons)

  with mock.patch.object(dispatch, "_log_choice", record):
    yield found
