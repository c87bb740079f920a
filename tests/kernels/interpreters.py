# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs TPU kernels on the CPU, in ways that each find another fault."""

import contextlib
import faulthandler
import functools
from unittest import mock

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu

# LLVM takes ten times as long to optimise an interpreted kernel as to run it.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}

# on_wait copies when waited for: a missing wait reads NaN. eager copies at
# once: a buffer that is filled too early is overwritten. The last names races.
MODES = {
  "on_wait": pltpu.InterpretParams(dma_execution_mode="on_wait"),
  "eager": pltpu.InterpretParams(dma_execution_mode="eager"),
  # Eager, for a copy that is never waited for is else never made: no race.
  "races": pltpu.InterpretParams(
    dma_execution_mode="eager", detect_races=True, on_race="raise"
  ),
}
# A semaphore that nobody signals hangs the interpreter. Then the process ends,
# with every thread's stack; the slowest test takes a tenth of it.
_TIMEOUT_S = 240


# It has the least VMEM of v5e to 7x.
_CHIP = tpu.Chip("interpreter", 64 << 20, 1, True)


@contextlib.contextmanager
def numbers():
  """Numbers alone: copies are instant and nothing is checked; fast."""
  call = functools.partial(pl.pallas_call, interpret=True)
  with timeout(), chip(), mock.patch.object(pl, "pallas_call", call):
    yield


@contextlib.contextmanager
def timeout():
  """Ends the process if what is inside takes too long."""
  faulthandler.dump_traceback_later(_TIMEOUT_S, exit=True)
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()


def chip():
  """A chip for the kernels to ask about, where there is none."""
  return mock.patch.object(tpu, "chip", lambda: _CHIP)


@contextlib.contextmanager
def mode(name):
  """Simulated memories, copies and semaphores, in one of `MODES`."""
  try:
    with timeout(), chip(), pltpu.force_tpu_interpret_mode(MODES[name]):
      yield
  finally:
    # An exception leaves its buffers and semaphores behind.
    pltpu.reset_tpu_interpret_mode_state()
