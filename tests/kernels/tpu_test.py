# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels on several devices."""

import os
import subprocess
import sys

from absl.testing import absltest

_ON_FOUR_DEVICES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import pallas_kernels
from pallas_kernels import tpu
from pallas_kernels.indexer import mosaic_tpu as indexer_tpu
from pallas_kernels.indexer import reference as indexer_reference
from pallas_kernels.sparse_attention import mosaic_tpu as mla_tpu
from pallas_kernels.sparse_attention import reference as mla_reference
from tests.kernels import interpreters

mesh = jax.sharding.Mesh(
  np.reshape(jax.devices(), (2, 2)), ("a", "b"), axis_types=2 * (AxisType.Auto,)
)
everywhere = NamedSharding(mesh, PartitionSpec())
rng = np.random.default_rng(0)
over_devices = tpu.over_devices


def parts_of(function, *arrays):
  # Compares four devices with one; returns the shapes that a device was given.
  shapes = []

  def spy(function, arguments, splits):
    def record(*parts):
      shapes.append([x.shape for x in parts])
      return function(*parts)
    return over_devices(record, arguments, splits)

  arrays = [jnp.asarray(x) for x in arrays]
  options = dict(compiler_options=interpreters.COMPILER_OPTIONS)
  with interpreters.numbers():
    expected = jax.jit(lambda *x: function(*x), **options)(*arrays)
    placed = [jax.device_put(x, everywhere) for x in arrays]
    tpu.over_devices = spy
    actual = jax.jit(lambda *x: function(*x), **options)(*placed)
    tpu.over_devices = over_devices
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  return shapes[0]


def top_k(scores):
  return pallas_kernels.top_k(scores, 5, implementation="mosaic_tpu")


shapes = parts_of(top_k, np.float32(rng.normal(size=(8, 200))))
assert shapes == [(2, 200)], shapes
# Three rows do not divide: each device selects from all.
shapes = parts_of(top_k, np.float32(rng.normal(size=(3, 200))))
assert shapes == [(3, 200)], shapes


# The ways to cut, with the definitions: no interpreter runs their kernels on
# several devices.
def attend(*args):
  function = functools.partial(
    mla_reference.sparse_mla, scale=0.3, value_dim=16
  )
  return tpu.over_devices(function, args, mla_tpu._SPLITS)


def select(*args):
  function = functools.partial(indexer_reference.indexer_topk, k=5)
  return tpu.over_devices(function, args, indexer_tpu._SPLITS)


for batch, queries, part in ((4, 3, (1, 3)), (1, 4, (1, 1)), (3, 3, (3, 3))):
  keys = (1 if batch == 4 else batch, 40)
  indices = np.tile(np.arange(40), (batch, queries, 1))
  shapes = parts_of(
    attend,
    np.float32(rng.normal(size=(batch, queries, 3, 24))),
    np.float32(rng.normal(size=(batch, 40, 24))),
    np.int32(rng.permuted(indices, axis=-1)[..., :8]),
  )
  assert shapes == [(*part, 3, 24), (*keys, 24), (*part, 8)], shapes
  shapes = parts_of(
    select,
    np.float32(rng.normal(size=(batch, queries, 3, 24))),
    np.float32(rng.normal(size=(batch, 40, 24))),
    np.float32(rng.normal(size=(batch, queries, 3))),
    np.zeros((batch, queries), np.int32),
    np.int32(rng.integers(0, 41, size=(batch, queries))),
  )
  assert shapes[:3] == [(*part, 3, 24), (*keys, 24), (*part, 3)], shapes
  assert shapes[3:] == [part, part], shapes
"""


class OverDevicesTest(absltest.TestCase):
  def test_four_devices_share_the_work_and_compute_the_same(self):
    done = subprocess.run(
      [sys.executable, "-c", _ON_FOUR_DEVICES],
      capture_output=True,
      text=True,
      check=False,
      timeout=240,
      env=os.environ
      | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
      },
    )
    self.assertEqual(done.returncode, 0, done.stderr[-3000:])


if __name__ == "__main__":
  absltest.main()
