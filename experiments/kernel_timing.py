# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Times of GPU kernels: isolated, from the driver's counters, and sustained."""

import collections
import itertools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# More than Hopper's second-level cache (50 to 60 MB).
FLUSHED = jax.ShapeDtypeStruct((64 << 20,), jnp.float32)
# Below this a host's launch is slower than the kernel.
_LAUNCH_BOUND_MS = 0.3
# Of back-to-back calls, behind a first one that does not count.
_BATCHES = 5
# Calls that wait while one runs, so that the device never does; each holds its
# result.
_AHEAD = 2


class Sustained(NamedTuple):
  """Milliseconds of a call among others like it, by batch of calls.

  Attributes:
    median: over the batches, of a batch's mean.
    min: of them.
    max: of them.
  """

  median: float
  min: float
  max: float


def require_gpu(script: str) -> None:
  """Raises ValueError where JAX sees no GPU, whose driver counts the time."""
  if jax.default_backend() != "gpu":
    raise ValueError(
      f"{script} needs a GPU that JAX sees: got the platform"
      f" {jax.default_backend()!r}. Install JAX with its `cuda13` extra, on a"
      " machine with a Hopper GPU."
    )


def isolated_ms(function: Callable, *args, repeats: int = 7) -> float:
  """Median milliseconds of the kernels of one call, caches flushed before.

  Args:
    function: of `args`; its kernels' times are summed, gaps between them are
      not.
    *args: arrays.
    repeats: measured calls; each has a warm-up of its own.
  """
  from jax.experimental.mosaic.gpu import profiler

  flushed = jnp.ones(FLUSHED.shape, FLUSHED.dtype)
  measure = profiler.Cupti(finalize=False).measure
  _, alone = measure(_flush, aggregate=False)(flushed)
  measured = measure(after_flush(function), aggregate=False)
  times = []
  for _ in range(repeats):
    _, kernels = measured(flushed, *args)
    times.append(sum(ms for _, ms in kernels[len(alone) :]))
  return statistics.median(times)


def kernel_times(function: Callable, *args) -> list[tuple[str, float]]:
  """Name and milliseconds of each kernel of one call, after a warm-up.

  Args:
    function: compiled, of `args`.
    *args: arrays.
  """
  from jax.experimental.mosaic.gpu import profiler

  measure = profiler.Cupti(finalize=False).measure(function, aggregate=False)
  measure(*args)
  return measure(*args)[1]


def after_flush(function: Callable) -> Callable:
  """The program that `isolated_ms` times, jitted.

  Args:
    function: of any arrays.

  Returns:
    A function of `FLUSHED`'s array and those of `function`.
  """

  def flush_and_run(x, *args):
    x, args = jax.lax.optimization_barrier((_flush(x), args))
    return x, function(*args)

  return jax.jit(flush_and_run)


@jax.jit
def _flush(x):
  return x * 1.5


def sustained_ms(run: Callable, *args, launches: int = 40) -> Sustained:
  """Milliseconds of back-to-back calls, by the wall clock.

  For kernels that are shorter than their launch, the driver's kernel times
  instead. Either way the calls come in equal batches. The clocks settle in the
  first one, which is a warm-up and does not count.

  Args:
    run: compiled, of `args`.
    *args: arrays.
    launches: of all batches, rounded up to whole ones.
  """
  found = wall_ms(run, *args, launches=launches)
  if found.median > _LAUNCH_BOUND_MS:
    return found
  from jax.experimental.mosaic.gpu import profiler

  size = _batch_size(launches)
  measure = profiler.Cupti(finalize=False).measure
  _, times = measure(run, iterations=size * (1 + _BATCHES))(*args)
  _, *batches = map(statistics.mean, itertools.batched(times, size))
  return _summary(batches)


def wall_ms(run: Callable, *args, launches: int) -> Sustained:
  """As `sustained_ms`, by the wall clock whatever a call takes."""
  size = _batch_size(launches)
  waiting = collections.deque(run(*args) for _ in range(_AHEAD))
  ends = []
  for _ in range(1 + _BATCHES):
    for _ in range(size):
      waiting.append(run(*args))
      jax.block_until_ready(waiting.popleft())
    ends.append(time.perf_counter())
  jax.block_until_ready(list(waiting))
  return _summary(
    [(end - begin) / size * 1e3 for begin, end in itertools.pairwise(ends)]
  )


def _batch_size(launches):
  return -(-launches // (1 + _BATCHES))


def _summary(batches):
  return Sustained(statistics.median(batches), min(batches), max(batches))


def matmul_ceiling(dtype, size: int = 8192) -> dict[str, float]:
  """TFLOP/s of the library's matrix product, in this run, on this card."""
  keys = jax.random.split(jax.random.key(0))
  a, b = (
    jax.random.normal(key, (size, size), jnp.float32).astype(dtype)
    for key in keys
  )

  def product(a, b):
    return jnp.matmul(a, b.T, preferred_element_type=jnp.bfloat16)

  return _rates(2 * size**3, product, a, b)


def copy_ceiling(num_bytes: int = 4 << 30) -> dict[str, float]:
  """TB/s of a copy, bytes read plus bytes written, likewise."""
  x = jnp.zeros(num_bytes // 4, jnp.int32)
  return _rates(2 * num_bytes, lambda x: x + 1, x)


def _rates(work, function, *args):
  sustained = sustained_ms(jax.jit(function), *args, launches=100)
  return {
    "isolated": work / isolated_ms(function, *args) / 1e9,
    "sustained": work / sustained.median / 1e9,
  }
