# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The experts on Hopper: few rows by a kernel of their own, many sorted."""

import functools

import jax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.expert_mlp import mosaic_gpu_few_rows as few_rows
from pallas_kernels.expert_mlp import reference
from pallas_kernels.expert_mlp import shared as shared_lib
from pallas_kernels.grouped import mosaic_gpu as grouped


def expert_mlp(
  rows: Float[Array, "M E"],
  experts: Int32[Array, "M J"],
  weights: Float32[Array, "M J"],
  gate: Float[Array, "G E F"],
  up: Float[Array, "G E F"],
  down: Float[Array, "G F E"],
  shared: shared_lib.SharedExpert | None = None,
) -> Float[Array, "M E"]:
  """See `api.expert_mlp`.

  Raises:
    NotImplementedError: another dtype or GPU, or widths that are no multiple
      of the kernels' blocks.
  """
  grouped.check(rows, gate)
  if len(rows) > few_rows.MAX_ROWS:
    return _many_rows(rows, experts, weights, gate, up, down, shared)
  return _few_rows(rows, experts, weights, gate, up, down, shared)


_many_rows = functools.partial(
  reference.expert_mlp, grouped_matmul=grouped.grouped_matmul
)


# Few rows are those of a decode step; where they are trained on all the same,
# the sorted form has the gradient.
@jax.custom_vjp
def _few_rows(*args):
  return few_rows.expert_mlp(*args)


def _forward(*args):
  return _few_rows(*args), args


def _backward(args, grad):
  rows, experts, *rest = args
  _, vjp = jax.vjp(
    lambda rows, *rest: _many_rows(rows, experts, *rest), rows, *rest
  )
  grad_rows, *grads = vjp(grad)
  return grad_rows, None, *grads


_few_rows.defvjp(_forward, _backward)
