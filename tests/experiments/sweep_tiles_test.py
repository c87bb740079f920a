# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The sweep of tiles: what it checks and records; never a time."""

from absl.testing import absltest

from tests.experiments import scripts_test

# In a process of its own, as scripts share names of flags.
_LOGIC = """
import jax.numpy as jnp
from absl import flags
from experiments import kernel_timing, sweep_tiles
from typing import NamedTuple

class Tiles(NamedTuple):
  factor: float

def run(x, tiles):
  if tiles.factor == 3:
    raise NotImplementedError("three")
  return tiles.factor * x

flags.FLAGS(["sweep_tiles"])
kernel_timing.isolated_ms = lambda function, x, repeats: 2.0
workload = sweep_tiles.Workload(
  "op", "shape", lambda key: (jnp.ones(3),), run, lambda x: x, lambda x: x, 0.1
)
sweep = sweep_tiles.Sweep(workload, tuple(map(Tiles, (1.0, 1.05, 2.0, 3.0))))
first, near, wrong, broken = sweep_tiles.bench(sweep)
assert first["chosen"] and first["tiles"] == "factor=1.0", first
assert first["ms"] == 2.0 and first["ratio"] == 1.0, first
assert not near["chosen"] and near["ms"] == 2.0 and near["error"] > 0, near
assert wrong["fault"] == "error above 0.1" and "ms" not in wrong, wrong
assert broken["fault"] == "NotImplementedError: three", broken
error = sweep_tiles.relative_error
inf = jnp.array([1.0, -jnp.inf])
assert error(inf, inf) == 0 and error(inf, jnp.ones(2)) == jnp.inf
for sweep in sweep_tiles.SWEEPS:
  assert len(set(sweep.variants)) == len(sweep.variants), sweep
try:
  sweep_tiles.choose(["top"])
except ValueError as message:
  assert "got ['top']" in str(message)
print("right")
"""


class SweepTilesTest(absltest.TestCase):
  def test_what_is_recorded(self):
    done = scripts_test.run_python("-c", _LOGIC)
    self.assertEqual(done.stdout.strip(), "right", done.stderr)

  def test_needs_a_gpu(self):
    done = scripts_test.run("sweep_tiles")
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertIn("sweep_tiles needs a GPU that JAX sees: got", done.stderr)
    self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
  absltest.main()
