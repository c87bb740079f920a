# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Times of GPU kernels: isolated, from the driver's counters, and sustained."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

# More than Hopper's second-level cache (50 to 60 MB).
_FLUSH_FLOATS = 64 << 20
# Below this a host's launch is slower than the kernel.
_LAUNCH_BOUND_MS = 0.3


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

  flushed = jnp.ones(_FLUSH_FLOATS, jnp.float32)
  measure = profiler.Cupti(finalize=False).measure

  @jax.jit
  def flush(x):
    return x * 1.5

  def flush_and_run(x, *args):
    x, args = jax.lax.optimization_barrier((flush(x), args))
    return x, function(*args)

  _, alone = measure(flush, aggregate=False)(flushed)
  measured = measure(jax.jit(flush_and_run), aggregate=False)
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


def sustained_ms(function: Callable, *args, launches: int = 40) -> float:
  """Mean milliseconds of back-to-back calls, by the wall clock.

  For kernels that are shorter than their launch, the mean of the driver's
  kernel times instead.
  """
  run = jax.jit(function)
  ms = wall_ms(run, *args, launches=launches)
  if ms > _LAUNCH_BOUND_MS:
    return ms
  from jax.experimental.mosaic.gpu import profiler

  _, times = profiler.Cupti(finalize=False).measure(run, iterations=launches)(
    *args
  )
  return statistics.mean(times)


def wall_ms(run: Callable, *args, launches: int) -> float:
  """Mean milliseconds of back-to-back calls of a compiled function."""
  for _ in range(2):
    jax.block_until_ready(run(*args))
  begin = time.perf_counter()
  for _ in range(launches):
    out = run(*args)
  jax.block_until_ready(out)
  return (time.perf_counter() - begin) / launches * 1e3


def matmul_ceiling(dtype, size: int = 8192) -> dict[str, float]:
  """TFLOP/s of the library's matrix product, in this run, on this card."""
  keys = jax.random.split(jax.random.key(0))
  a, b = (
    jax.random.normal(key, (size, size), jnp.float32).astype(dtype)
    for key in keys
  )

  def product(a, b):
    return jnp.matmul(a, b.T, preferred_element_type=jnp.bfloat16)

  flops = 2 * size**3
  return {
    "isolated": flops / isolated_ms(product, a, b) / 1e9,
    "sustained": flops / sustained_ms(product, a, b, launches=100) / 1e9,
  }


def copy_ceiling(num_bytes: int = 4 << 30) -> float:
  """TB/s of a copy, bytes read plus bytes written."""
  x = jnp.zeros(num_bytes // 4, jnp.int32)
  return 2 * num_bytes / isolated_ms(lambda x: x + 1, x) / 1e9
