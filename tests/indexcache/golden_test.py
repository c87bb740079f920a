# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Equality with transformers on the committed fixtures; needs no torch."""

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from tests.oracle import compare, fixtures


class GoldenTest(parameterized.TestCase):
  @parameterized.product(
    name=fixtures.NAMES, length=(fixtures.SHORT, fixtures.LONG)
  )
  def test_equals_transformers(self, name, length):
    comparison = fixtures.compare_right(name, length)
    self.assertTrue(comparison.is_equal, msg=str(comparison))

  @parameterized.parameters(*fixtures.NAMES)
  def test_is_short_and_long_beside_index_topk(self, name):
    config = fixtures.load(name).config
    self.assertGreaterEqual(config.index_n_heads, 16)
    self.assertLess(fixtures.SHORT, config.index_topk)
    self.assertGreaterEqual(fixtures.LONG, 4 * config.index_topk)

  def test_schedules_are_read_in_every_notation(self):
    patterns = {
      name: fixtures.load(name).config.schedule.pattern
      for name in fixtures.NAMES
    }
    self.assertEqual(
      patterns,
      {
        "deepseek_grouped_yarn": "FFF",  # No notation: all full.
        "glm_52_rule": "FFFSSSFS",  # index_topk_freq 4, offset 3.
        "glm_full": "FFF",
        "glm_irregular_grouped": "FSFFS",  # indexer_types.
        "glm_small_latents": "FSFS",  # index_topk_pattern.
      },
    )


class CompareTest(absltest.TestCase):
  def test_a_difference_of_the_tolerance_is_seen(self):
    expected = fixtures.load("glm_full").expected[fixtures.LONG]
    largest = np.abs(expected.logits).max()
    for factor, is_equal in ((0.5, True), (2.0, False)):
      logits = expected.logits.copy()
      logits[0, 3, 5] += factor * compare.LOGIT_TOLERANCE * largest
      actual = compare.Outputs(logits, expected.topk_indices)
      self.assertEqual(compare.compare(actual, expected).is_equal, is_equal)

  def test_nan_is_not_equal(self):
    expected = fixtures.load("glm_full").expected[fixtures.LONG]
    logits = expected.logits.copy()
    logits[0, 0, 0] = np.nan
    actual = compare.Outputs(logits, expected.topk_indices)
    self.assertFalse(compare.compare(actual, expected).is_equal)

  def test_selections_are_compared_as_sets(self):
    expected = fixtures.load("glm_full").expected[fixtures.LONG]
    turned = np.pad(
      expected.topk_indices[..., ::-1],
      [(0, 0)] * 3 + [(0, 2)],
      constant_values=-1,
    )
    actual = compare.Outputs(expected.logits, turned)
    self.assertTrue(compare.compare(actual, expected).is_equal)
    turned[1, 0, 20, 0] = -1  # One key of one row.
    comparison = compare.compare(actual, expected)
    self.assertEqual(comparison.num_wrong_rows, 1)
    self.assertFalse(comparison.is_equal)


class ParametersTest(parameterized.TestCase):
  @parameterized.parameters(*fixtures.NAMES)
  def test_no_norm_scale_or_bias_is_trivial(self, name):
    params = fixtures.load(name).params
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    vectors = {path: leaf for path, leaf in flat.items() if leaf.ndim == 1}
    self.assertNotEmpty([path for path in vectors if "k_norm/bias" in path])
    for path, leaf in vectors.items():
      self.assertGreater(float(jnp.std(leaf)), 0.05, msg=path)

  def test_shared_layers_own_no_indexer(self):
    fixture = fixtures.load("glm_52_rule")
    owners = [
      "indexer" in fixture.params[f"layers_{layer}"]["self_attn"]
      for layer in range(fixture.config.num_hidden_layers)
    ]
    expected = ic.ReuseSchedule.from_freq(8, 4, offset=3)
    self.assertEqual(owners, [expected.is_full(layer) for layer in range(8)])


if __name__ == "__main__":
  absltest.main()
