# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

import indexcache_jax as ic
from indexcache_jax import sharding, text
from tests import tolerances

# The number of CPU devices is fixed when jax starts, hence a program.
_ON_FOUR_DEVICES = """
import json, jax, jax.numpy as jnp, numpy as np
import indexcache_jax as ic
from indexcache_jax import sharding
from tests.indexcache import sharding_test

config = ic.load_config(ic.embedded_checkpoint())
shapes = jax.eval_shape(
  ic.SparseTransformer(config).init,
  jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32),
)["params"]
shardings = sharding.parameter_shardings(shapes)
config, params = ic.load_checkpoint(
  ic.embedded_checkpoint(), sharding=shardings, progress=False
)
leaves = jax.tree.leaves(params)
spec = lambda *shape: list(
  sharding.parameter_shardings(jax.ShapeDtypeStruct(shape, jnp.float32)).spec
)
print(json.dumps({
  "loss": sharding_test.loss(config, params),
  "bytes": sum(leaf.nbytes for leaf in leaves),
  "bytes_by_device": [
    sum(
      shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards
      if shard.device == device
    )
    for device in jax.devices()
  ],
  "specs": [spec(8, 12), spec(12, 8), spec(8, 8), spec(30, 4), spec(6, 7)],
  "of_two": [
    str(device)
    for device in sorted(
      sharding.parameter_shardings(shapes, jax.devices()[2:])
      ["norm"]["scale"].device_set, key=str
    )
  ],
}))
"""


def loss(config, params):
  """Under sparse attention, a quarter of the keys selected."""
  tokens = text.load_tokens(
    text.standard_library_files(), text.encode_bytes, 256
  )
  loss_fn = ic.LayerwiseLoss(config, params, tokens.reshape(1, 2, 128))
  return loss_fn(ic.ReuseSchedule.uniform(config.num_hidden_layers, 2))


class ShardingTest(absltest.TestCase):
  def test_four_devices_hold_a_quarter_each_and_compute_the_same(self):
    done = subprocess.run(
      [sys.executable, "-c", _ON_FOUR_DEVICES],
      capture_output=True,
      text=True,
      check=False,
      env=os.environ
      | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
      },
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    result = json.loads(done.stdout)
    config, params = ic.load_checkpoint(
      ic.embedded_checkpoint(), progress=False
    )
    # The longest sum of a matrix product is that of the MLP's output.
    np.testing.assert_allclose(
      result["loss"],
      loss(config, params),
      **tolerances.tolerance("float32", config.intermediate_size),
    )
    for held in result["bytes_by_device"]:
      self.assertBetween(held / result["bytes"], 0.25, 0.26)
    # Largest axis; among equals the first; one that 4 divides; none.
    self.assertEqual(
      result["specs"],
      [[None, "devices"], ["devices"], ["devices"], [None, "devices"], []],
    )
    self.assertLen(result["of_two"], 2)

  def test_needs_a_device(self):
    shapes = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    with self.assertRaisesRegex(ValueError, "at least one device: got none"):
      sharding.parameter_shardings(shapes, [])


if __name__ == "__main__":
  absltest.main()
