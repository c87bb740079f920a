# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the small calls reach, traced as on an H200."""

import collections
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import row_sums
from tests.gpu import calls
from tests.kernels import errors, pretended

# Launches of kernels that a call's name promises.
_PROMISED = {
  "top_k": {"top_k": 1},
  # The blocks' own, and what merges them.
  "top_k few rows": {"top_k": 2},
  "indexer_topk decode fp8": {"indexer_scores_few_queries": 1, "top_k": 2},
  "sparse_mla 20 heads": {"sparse_mla_few_heads": 1},
  "sparse_mla shared rows": {"sparse_mla": 1, "sparse_mla_shared_rows": 1},
  "sparse_mla float8 20 heads": {"sparse_mla_few_heads": 1},
  "sparse_mla 128 heads": {"sparse_mla": 1, "sparse_mla_mean_probs": 1},
  "sparse_mla backward": {"sparse_mla_backward": 1, "row_sums": 1},
  "selected_indexer_scores": {
    "selected_indexer_scores_backward": 1,
    "row_sums": 1,
  },
  "expert_mlp decode": {"expert_mlp_few_rows": 2},
}


class CallsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(errors.unchecked())
    self.enter_context(pretended.gpu("NVIDIA H200"))
    self.enter_context(
      mock.patch.object(
        calls,
        "_normal",
        lambda _, *shape, dtype=jnp.bfloat16: jnp.ones(shape, dtype),
      )
    )

  def trace(self, name):
    """Traces a call; returns the grid of each kernel's launches."""
    function, args = calls.CALLS[name]()
    launches = collections.defaultdict(list)

    def kernel(body, **kwargs):
      name = kwargs.get("kernel_name") or getattr(body, "__name__", "")
      launches[name].append(kwargs["grid"])
      return real_kernel(body, **kwargs)

    real_kernel = plgpu.kernel
    with mock.patch.object(plgpu, "kernel", kernel):
      # A function of its own: JAX remembers what it traced.
      jax.eval_shape(lambda *args: function(*args), *args)
    return launches

  @parameterized.parameters(*calls.CALLS)
  def test_runs_kernels_alone(self, name):
    with pretended.choices() as choices:
      launches = self.trace(name)
    self.assertTrue(launches)
    self.assertLen(choices, 0 if name == "named barriers" else 1)
    for op, choice in choices.items():
      self.assertStartsWith(name, op)
      self.assertEqual(choice, ("mosaic_gpu", ""))
    for kernel, count in _PROMISED.get(name, {}).items():
      self.assertLen(launches[kernel], count)

  @parameterized.parameters("sparse_mla decode", "sparse_mla float8 decode")
  def test_decoding_splits_a_querys_rows(self, name):
    launches = self.trace(name)
    self.assertGreater(launches["sparse_mla"][0], (8,))
    self.assertEqual(launches["sparse_mla_mean_probs"], [(8,)])

  def test_two_chunks_of_each_sequence(self):
    bounds = []

    def chunk_bounds(sizes):
      bounds.extend(real_bounds(sizes))
      return bounds

    real_bounds = row_sums.chunk_bounds
    with mock.patch.object(row_sums, "chunk_bounds", chunk_bounds):
      self.trace("sparse_mla backward in chunks")
    self.assertEqual(
      bounds,
      [(0, 67, 0), (67, 100, 0), (100, 167, 4096), (167, 200, 4096)],
    )

  def test_unknown_call(self):
    with self.assertRaisesRegex(ValueError, r"`--calls`.*got \['top'\]"):
      calls.check(["top_k", "top"])


if __name__ == "__main__":
  absltest.main()
