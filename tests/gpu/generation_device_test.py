# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The embedded model writes the same text on the GPU and on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from tests.gpu import device


def setUpModule():
  device.require_hopper()


class GenerationDeviceTest(parameterized.TestCase):
  @parameterized.parameters("uniform:1", "uniform:4")
  def test_tokens_are_those_of_the_cpu(self, notation):
    path = ic.embedded_checkpoint()
    num_layers = ic.load_config(path).num_hidden_layers
    config, params = ic.load_checkpoint(
      path,
      schedule=ic.ReuseSchedule.parse(notation, num_layers),
      dtype=jnp.float32,
    )
    # Longer than index_topk, and of different lengths.
    prompts = [
      list(b"import os\n\n\ndef read_lines(path):\n" * 4),
      list(b"class Queue:\n  '''First in, first out.'''\n\n" * 2),
    ]

    def generate(config, params):
      return ic.generate(
        config, params, prompts, max_new_tokens=64, chunk_size=48
      )

    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
      expected = generate(
        config.replace(implementation="xla"), jax.device_put(params, cpu)
      )
    np.testing.assert_array_equal(generate(config, params), expected)


if __name__ == "__main__":
  absltest.main()
