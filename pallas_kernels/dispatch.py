# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The choice between an op's implementations: one rule for every op."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import logging


def run(
  op: str,
  implementations: Mapping[str, Callable],
  order: Mapping[str, Sequence[str]],
  implementation: str | None,
  *args,
  **kwargs,
):
  """Calls a named implementation, or the platform's first that fits.

  Args:
    op: name of the public function, for messages.
    implementations: by name; "xla" is the reference.
    order: names to try by platform ("gpu", "tpu"); "xla" follows by itself.
    implementation: a name, which runs or raises; None: the platform's order,
      in which NotImplementedError alone passes to the next.
    *args: of the implementation.
    **kwargs: of the implementation.

  Raises:
    ValueError: no such implementation.
    ExceptionGroup: None fits; it holds each one's reason.
  """
  if implementation is not None:
    if implementation not in implementations:
      raise ValueError(
        f"`implementation` of `{op}` must be None or one of"
        f" {sorted(implementations)}: got {implementation!r}."
      )
    return implementations[implementation](*args, **kwargs)
  reasons = []
  for name in (*order.get(jax.default_backend(), ()), "xla"):
    try:
      result = implementations[name](*args, **kwargs)
    except NotImplementedError as reason:
      reason.add_note(f"from implementation {name!r} of `{op}`")
      reasons.append(reason)
      continue
    _log_choice(op, name, "; ".join(map(str, reasons)))
    return result
  raise ExceptionGroup(f"No implementation of `{op}` fits", reasons)


@functools.cache
def _log_choice(op, name, reasons):
  """Logs each distinct choice once a process."""
  because = f" (passed over: {reasons})" if reasons else ""
  logging.info("%s runs as %r%s", op, name, because)
