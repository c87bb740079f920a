# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels take for their chip, and what the ops do on others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AbstractDevice, AbstractMesh

import pallas_kernels
from pallas_kernels.hopper import chip
from tests.kernels import errors, pretended

# What it says of a device that is none.
_MESSAGE = r"compiled for Hopper \(H100, .*\): got {}"
_OTHERS = ("NVIDIA A100-SXM4-80GB", "NVIDIA B200")


class ChipTest(parameterized.TestCase):
  @parameterized.parameters(
    "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H20", "NVIDIA GH200 480GB"
  )
  def test_hopper(self, kind):
    with pretended.gpu(kind, multiprocessors=114):
      self.assertEqual(chip.chip(), (kind, 114))

  @parameterized.parameters(*_OTHERS, "NVIDIA H2000", "NVIDIA L40S")
  def test_others(self, kind):
    with (
      pretended.gpu(kind),
      self.assertRaisesRegex(NotImplementedError, _MESSAGE.format(kind)),
    ):
      chip.chip()

  def test_no_gpu(self):
    if jax.default_backend() != "cpu":
      self.skipTest("what a machine without a GPU says")
    with self.assertRaisesRegex(NotImplementedError, _MESSAGE.format("cpu")):
      chip.chip()

  def test_that_of_the_abstract_mesh_comes_first(self):
    device = AbstractDevice("NVIDIA H200", None, "cuda")
    mesh = AbstractMesh((), (), abstract_device=device)
    with pretended.gpu(_OTHERS[0]), jax.sharding.use_abstract_mesh(mesh):
      self.assertEqual(chip.chip(), ("NVIDIA H200", 132))


def _normal(seed, *shape, dtype=jnp.bfloat16):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def _latents():
  return _normal(0, 1, 4, 8, 64), _normal(1, 1, 40, 64)


def _indexer():
  return *_latents(), _normal(2, 1, 4, 8, dtype=jnp.float32)


def _bounds():
  return jnp.zeros((1, 4), jnp.int32), jnp.full((1, 4), 40, jnp.int32)


def _selected():
  return jnp.arange(32, dtype=jnp.int32).reshape(1, 4, 8)


def _grouped():
  sizes = jnp.asarray([5, 0, 2, 1], jnp.int32)
  return _normal(0, 8, 128), _normal(1, 4, 128, 128), sizes


def _expert_mlp():
  experts = jnp.arange(16, dtype=jnp.int32).reshape(8, 2) % 4
  matrices = _normal(1, 3, 4, 128, 128)
  return _normal(0, 8, 128), experts, jnp.ones((8, 2)), *matrices


# Of each op with a kernel for Hopper: arguments that this fits, and the others.
OPS = {
  "top_k": (lambda: (_normal(0, 4, 40, dtype=jnp.float32),), {"k": 8}),
  "indexer_scores": (lambda: (*_indexer(), *_bounds()), {}),
  "indexer_topk": (lambda: (*_indexer(), *_bounds()), {"k": 8}),
  "selected_indexer_scores": (lambda: (*_indexer(), _selected()), {}),
  "sparse_mla": (
    lambda: (*_latents(), _selected()),
    {"scale": 0.1, "value_dim": 32},
  ),
  "dense_mla_residuals": (
    lambda: (*_latents(), *_bounds()),
    {"scale": 0.1},
  ),
  "grouped_matmul": (_grouped, {}),
  "expert_mlp": (_expert_mlp, {}),
}


def call(op, implementation=None):
  """The op as a function of its arguments, and these."""
  args, kwargs = OPS[op]
  run = functools.partial(
    getattr(pallas_kernels, op), **kwargs, implementation=implementation
  )
  return jax.jit(run), args()


class OtherGPUsTest(parameterized.TestCase):
  """Every op on a GPU that its kernel was not made for."""

  @parameterized.product(op=list(OPS), kind=_OTHERS)
  def test_a_named_kernel_raises(self, op, kind):
    run, args = call(op, "mosaic_gpu")
    with (
      pretended.gpu(kind),
      self.assertRaisesRegex(NotImplementedError, _MESSAGE.format(kind)),
    ):
      run(*args)

  @parameterized.product(op=list(OPS), kind=_OTHERS)
  def test_none_is_the_reference(self, op, kind):
    run, args = call(op)
    with pretended.gpu(kind), pretended.choices() as choices:
      actual = run(*args)
    ((name, reasons),) = choices.values()
    self.assertEqual(name, "xla")
    self.assertRegex(reasons, _MESSAGE.format(kind))
    reference, _ = call(op, "xla")
    expected = reference(*args)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)

  @parameterized.parameters(*OPS)
  def test_on_hopper_none_is_the_kernel(self, op):
    run, args = call(op)
    with (
      errors.unchecked(),
      pretended.gpu("NVIDIA H200"),
      pretended.choices() as choices,
    ):
      jax.eval_shape(run, *args)
    self.assertEqual(choices, {op: ("mosaic_gpu", "")})


if __name__ == "__main__":
  absltest.main()
