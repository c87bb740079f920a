# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of each training stage through the kernels, against float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import indexcache_jax as ic
from indexcache_jax import presets, training
from tests.gpu import device

# Above index_topk, so that sparse attention leaves keys out.
_CONTEXT = 512
_TRAIN = training.TrainConfig(
  context=_CONTEXT, batch_size=2, dense_steps=1, warmup_steps=1, sparse_steps=1
)


def setUpModule():
  device.require_hopper()


def config():
  """Two layers of the paper's experiment, one without an indexer."""
  return presets.PRESETS["paper"]().replace(
    num_hidden_layers=2,
    first_k_dense_replace=2,
    index_topk=128,
    schedule=ic.ReuseSchedule("FS"),
    dtype=jnp.bfloat16,
    param_dtype=jnp.float32,
  )


def inputs():
  """Parameters in float32, and tokens."""
  tokens = np.random.default_rng(0).integers(
    0, config().vocab_size, (2, _CONTEXT), np.int32
  )
  model = ic.SparseTransformer(config().replace(implementation="xla"))
  params = jax.jit(model.init)(jax.random.key(0), tokens[:, :8])["params"]
  return params, tokens


def gradients(config, stage, params, tokens):
  """Of what a stage minimises; what is frozen has zeros."""
  loss = functools.partial(training._total_loss, config, _TRAIN, stage)
  return jax.grad(loss, has_aux=True)(params, tokens)[0]


def errors(actual, expected):
  """Relative error of each array that has a gradient, by its path."""
  found = {}
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  for (path, leaf), other in zip(leaves, jax.tree.leaves(actual), strict=True):
    norm = np.linalg.norm(leaf)
    if norm:
      found[jax.tree_util.keystr(path)] = np.linalg.norm(other - leaf) / norm
  return found


class TrainingDeviceTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.inputs = inputs()

  def run_stage(self, stage, **changes):
    run = jax.jit(
      functools.partial(gradients, config().replace(**changes), stage)
    )
    return jax.device_get(run(*self.inputs))

  @parameterized.parameters("dense", "warmup", "sparse")
  def test_errors_are_those_of_rounding(self, stage):
    exact = self.run_stage(stage, implementation="xla", dtype=jnp.float32)
    rounded = errors(self.run_stage(stage, implementation="xla"), exact)
    found = errors(self.run_stage(stage), exact)
    self.assertEqual(set(found), set(rounded))
    self.assertNotEmpty(found)
    for name, error in found.items():
      with self.subTest(name):
        # XLA rounds in another order, and not in every place.
        self.assertLess(error, 2 * rounded[name] + 0.01)
        self.assertLess(error, 0.2)

  @parameterized.parameters("warmup", "sparse")
  def test_run_to_run_bit_equal(self, stage):
    run = jax.jit(functools.partial(gradients, config(), stage))
    first = jax.device_get(run(*self.inputs))
    # cuDNN's gradient sums in no fixed order; the warm-up has none of it.
    for _ in range(3):
      jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(run(*self.inputs)), first
      )


if __name__ == "__main__":
  device.main()
