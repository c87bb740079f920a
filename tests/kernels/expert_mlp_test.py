# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.expert_mlp import reference
from pallas_kernels.grouped import reference as grouped_reference
from tests import tolerances
from tests.kernels import errors

_expert_mlp = jax.jit(
  pallas_kernels.expert_mlp, static_argnames="implementation"
)


def float64_loop(rows, experts, weights, gate, up, down, shared=None):
  """A product for each row and choice, in float64."""
  rows, weights, gate, up, down = (
    np.asarray(x, np.float64) for x in (rows, weights, gate, up, down)
  )

  def mlp(row, gate, up, down):
    gated = row @ gate
    return (gated / (1 + np.exp(-gated)) * (row @ up)) @ down

  out = np.zeros_like(rows)
  for row, choices in enumerate(np.asarray(experts)):
    for choice, expert in enumerate(choices):
      out[row] += weights[row, choice] * mlp(
        rows[row], gate[expert], up[expert], down[expert]
      )
    if shared is not None:
      out[row] += mlp(rows[row], *(np.asarray(x, np.float64) for x in shared))
  return out


class ExpertMLPTest(parameterized.TestCase):
  IMPLEMENTATION = "xla"
  DTYPE = "float32"
  WIDTHS = (24, 40)
  ROWS = (1, 5, 64, 130)

  def inputs(self, num_rows, num_experts=6, choices=2, seed=0, num_shared=0):
    rng = np.random.default_rng(seed)
    width, inner = self.WIDTHS

    def normal(*shape, scale=1.0):
      return jnp.asarray(scale * rng.normal(size=shape), self.DTYPE)

    experts = rng.permuted(
      np.tile(np.arange(num_experts), (num_rows, 1)), axis=1
    )[:, :choices]
    args = (
      normal(num_rows, width),
      jnp.asarray(experts, jnp.int32),
      jnp.asarray(rng.uniform(0.1, 1, (num_rows, choices)), jnp.float32),
      normal(num_experts, width, inner, scale=width**-0.5),
      normal(num_experts, width, inner, scale=width**-0.5),
      normal(num_experts, inner, width, scale=inner**-0.5),
    )
    if not num_shared:
      return args
    total = num_shared * inner
    shared = pallas_kernels.SharedExpert(
      normal(width, total, scale=width**-0.5),
      normal(width, total, scale=width**-0.5),
      normal(total, width, scale=total**-0.5),
    )
    return (*args, shared)

  def run_op(self, *args):
    return _expert_mlp(*args, implementation=self.IMPLEMENTATION)

  def check(self, args):
    actual = self.run_op(*args)
    self.assertEqual(actual.dtype, jnp.dtype(self.DTYPE))
    np.testing.assert_allclose(
      np.asarray(actual, np.float64),
      float64_loop(*args),
      **tolerances.tolerance(self.DTYPE, 4),
    )

  def test_equals_a_float64_loop(self):
    for num_rows in self.ROWS:
      with self.subTest(rows=num_rows):
        self.check(self.inputs(num_rows))

  @parameterized.parameters(1, 2)
  def test_shared_experts(self, num_shared):
    for num_rows in self.ROWS:
      with self.subTest(rows=num_rows):
        self.check(self.inputs(num_rows, num_shared=num_shared))

  def test_a_row_costs_its_own_experts_alone(self):
    """Three grouped products of M J rows: no row meets all experts."""
    args = self.inputs(5)
    calls = []

    def product(rows, matrices, sizes):
      calls.append((rows.shape, matrices.shape, sizes.shape))
      return grouped_reference.grouped_matmul(rows, matrices, sizes)

    jax.eval_shape(
      functools.partial(reference.expert_mlp, grouped_matmul=product), *args
    )
    width, inner = self.WIDTHS
    wide = ((10, width), (6, width, inner), (6,))
    self.assertEqual(
      calls, [wide, wide, ((10, inner), (6, inner, width), (6,))]
    )

  def test_all_rows_through_the_same_experts(self):
    rows, experts, *rest = self.inputs(9)
    self.check((rows, jnp.broadcast_to(experts[:1], experts.shape), *rest))

  def test_gradients_are_those_of_a_loop(self):
    args = self.inputs(5, num_shared=1)
    experts = np.asarray(args[1])

    def mlp(row, gate, up, down):
      product = functools.partial(jnp.matmul, precision="highest")
      inner = jax.nn.silu(product(row, gate)) * product(row, up)
      return product(inner, down)

    def loop(rows, weights, gate, up, down, shared):
      out = []
      for row, choices in enumerate(experts):
        terms = [
          weights[row, choice]
          * mlp(rows[row], gate[expert], up[expert], down[expert])
          for choice, expert in enumerate(choices)
        ]
        out.append(sum(terms) + mlp(rows[row], *shared))
      return jnp.stack(out)

    def op(rows, *rest):
      return self.run_op(rows, args[1], *rest)

    def grads(form):
      def loss(*args):
        return jnp.sum(form(*args).astype(jnp.float32) ** 2)

      return jax.jit(jax.grad(loss, range(6)))(args[0], *args[2:])

    pairs = zip(*map(jax.tree.leaves, (grads(op), grads(loop))), strict=True)
    for actual, expected in pairs:
      scale = float(jnp.max(jnp.abs(expected)))
      np.testing.assert_allclose(
        np.asarray(actual, np.float32) / scale,
        np.asarray(expected, np.float32) / scale,
        **tolerances.tolerance(self.DTYPE, 4, grads=True),
      )

  def test_errors(self):
    *args, shared = self.inputs(3, num_shared=1)
    rows, experts, weights, gate, up, down = args
    with errors.unchecked():
      with self.assertRaisesRegex(ValueError, "one row a row of `rows`"):
        self.run_op(rows, experts, weights[1:], gate, up, down)
      with self.assertRaisesRegex(ValueError, r"`down` \[G, F, E\]"):
        self.run_op(rows, experts, weights, gate, up, up)
      with self.assertRaisesRegex(ValueError, "dtype of `rows`"):
        self.run_op(rows, experts, weights, gate.astype(jnp.float16), up, down)
      for bad in (
        shared._replace(gate=shared.gate[:-1]),
        shared._replace(up=shared.up[:, :-1]),
        shared._replace(down=shared.down.T),
        type(shared)(*(x[:0] for x in shared)),
        type(shared)(shared.gate[:, 1:], shared.up[:, 1:], shared.down[1:]),
      ):
        with self.assertRaisesRegex(ValueError, r"`shared` must be \[E, n F\]"):
          self.run_op(*args, bad)
      with self.assertRaisesRegex(ValueError, "`shared` must have the dtype"):
        self.run_op(*args, shared._replace(up=shared.up.astype(jnp.float16)))


if __name__ == "__main__":
  absltest.main()
