# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`selected_indexer_scores` and its gradients on the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import pallas_kernels
from tests import tolerances
from tests.gpu import device, float64, generated
from tests.kernels import gradient_loops
from tests.kernels import selected_scores_mosaic_gpu_test as shared

_REPEATS = 20
_ROUNDS = 4


def setUpModule():
  device.require_hopper()


class SelectedScoresDeviceTest(shared.SelectedScoresTest):
  def patches(self):
    return ()

  @parameterized.parameters(
    # More queries than pairs of warpgroups, and two chunks.
    (1, 700, 32, 128, 3000, 512),
    (3, 150, 8, 64, 500, 130),
    # Where ptxas once left a register unset; see `tests.gpu.disassembly`.
    (2, 512, 16, 64, 2048, 256),
    # More keys than selected, the whole cache, one query.
    (1, 1, 64, 128, 9000, 2048),
    (2, 40, 20, 128, 64, 64),
  )
  def test_drawn_cases_are_right_and_bit_equal(self, *shape):
    args = shared.inputs(*shape, seed=sum(shape))
    actual = shared.scores_and_gradients(*args)
    self.assert_right(args, actual)
    for _ in range(_REPEATS):
      again = shared.scores_and_gradients(*args)
      equal = jax.tree.map(jnp.array_equal, again, actual)
      self.assertTrue(all(jax.tree.leaves(equal)), equal)


@functools.partial(jax.jit, static_argnames=("implementation",))
def scores_and_gradients(q, keys, weights, indices, grad, implementation):
  out, vjp = jax.vjp(
    lambda *args: pallas_kernels.selected_indexer_scores(
      *args, indices, implementation=implementation
    ),
    *(q, keys, weights),
  )
  return out, vjp(grad)


class SelectedScoresGeneratedTest(parameterized.TestCase):
  IMPLEMENTATION = "mosaic_gpu"

  @parameterized.parameters(
    (2, 140, 32, 128, 700, 130),
    (1, 140, 64, 128, 500, 256),
    (3, 50, 8, 64, 300, 64),
    (1, 133, 1, 64, 400, 100),
    (1, 2, 20, 128, 20000, 2048),
  )
  def test_queries(self, batch, queries, heads, dim, num_keys, k):
    rng = np.random.default_rng(num_keys + k)
    tolerance = tolerances.tolerance("float32", dim * heads)
    for _ in range(_ROUNDS):
      q = generated.normal(rng, batch, queries, heads, dim)
      keys = generated.normal(rng, batch, num_keys, dim)
      weights = generated.normal(rng, batch, queries, heads, dtype=jnp.float32)
      indices = generated.selections(rng, batch, queries, num_keys, k)
      grad = generated.normal(rng, batch, queries, k, dtype=jnp.float32)
      out, grads = scores_and_gradients(
        q,
        generated.poisoned(keys),
        weights,
        indices,
        # That of no index counts for nothing.
        jnp.where(indices < 0, jnp.nan, grad),
        implementation=self.IMPLEMENTATION,
      )
      expected, wanted = float64.selected_scores(
        q, keys, weights, indices, grad
      )
      np.testing.assert_allclose(out, expected, **tolerance)
      for actual, want in zip(grads, wanted, strict=True):
        self.assertLess(gradient_loops.relative_error(actual, want), 1e-2)
      device.count_cases(batch * queries)


if __name__ == "__main__":
  device.main()
