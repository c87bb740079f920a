# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import functools
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import cache, generation
from tests import tolerances
from tests.indexcache import toy
from tests.kernels import errors

# index_topk is 8: below, at and above it, alone and with what is generated.
LENGTHS = (3, 8, 7, 21, 40)
NUM_NEW = 6


@functools.lru_cache
def prompts():
  tokens = np.asarray(toy.random_tokens(len(LENGTHS), max(LENGTHS), seed=11))
  return [
    row[:length].tolist() for row, length in zip(tokens, LENGTHS, strict=True)
  ]


def generate(pattern="FSFS", **changes):
  config = toy.config(pattern)
  arguments = {"prompts": prompts(), "max_new_tokens": NUM_NEW} | changes
  return ic.generate(config, toy.params_for(config), **arguments)


class GreedyTest(parameterized.TestCase):
  @parameterized.parameters(("FSFS", NUM_NEW), ("FSSS", 3))
  def test_equals_repeated_whole_forwards(self, pattern, num_new):
    config = toy.config(pattern)
    params = toy.params_for(config)
    # A right padding that causality hides: one shape for every step.
    tokens = np.zeros((len(LENGTHS), max(LENGTHS) + num_new), np.int32)
    for row, prompt in zip(tokens, prompts(), strict=True):
      row[: len(prompt)] = prompt
    rows, lengths = np.arange(len(LENGTHS)), np.array(LENGTHS)
    for step in range(num_new):
      logits, _ = toy.forward(config, params, jnp.asarray(tokens))
      places = lengths + step
      tokens[rows, places] = np.argmax(logits[rows, places - 1], axis=-1)
    expected = [
      row[length : length + num_new]
      for row, length in zip(tokens, lengths, strict=True)
    ]
    actual = generate(pattern, max_new_tokens=num_new)
    self.assertEqual(actual.dtype, np.int32)
    np.testing.assert_array_equal(actual, expected)

  @parameterized.parameters(10, 64)
  def test_chunked_prefill_changes_no_token(self, chunk_size):
    np.testing.assert_array_equal(generate(chunk_size=chunk_size), generate())

  def test_numpy_prompts(self):
    expected = generate()
    with errors.unchecked():
      for kind in (np.int32, np.int64, np.uint8):
        arrays = [np.array(prompt, kind) for prompt in prompts()]
        np.testing.assert_array_equal(generate(prompts=arrays), expected)
        lists = [list(array) for array in arrays]
        np.testing.assert_array_equal(generate(prompts=lists), expected)

  def test_one_array_of_prompts(self):
    matrix = np.array([prompts()[-1]] * len(LENGTHS))
    with errors.unchecked():
      tokens = generate(prompts=matrix)
    np.testing.assert_array_equal(tokens, generate()[[-1] * len(LENGTHS)])


class SamplingTest(absltest.TestCase):
  def test_is_a_function_of_the_seed(self):
    first = generate(temperature=1.0, seed=1)
    np.testing.assert_array_equal(first, generate(temperature=1.0, seed=1))
    other = generate(temperature=1.0, seed=2)
    self.assertFalse(np.array_equal(first, other))
    self.assertFalse(np.array_equal(first, generate()))
    for tokens in (first, other):
      self.assertTrue(np.all((tokens >= 0) & (tokens < 64)))

  def test_rows_draw_apart(self):
    tokens = generate(prompts=[prompts()[-1]] * len(LENGTHS), temperature=1.0)
    self.assertGreater(len(np.unique(tokens, axis=0)), 1)

  def test_the_seed_of_a_greedy_run_changes_nothing(self):
    np.testing.assert_array_equal(generate(seed=1), generate(seed=2))

  def test_a_low_temperature_is_greedy(self):
    np.testing.assert_array_equal(generate(temperature=1e-4), generate())

  def test_a_low_top_p_is_greedy(self):
    np.testing.assert_array_equal(
      generate(temperature=1.0, top_p=1e-6), generate()
    )

  def test_top_p_keeps_the_likeliest_that_reach_it(self):
    probs = np.array([[0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]])
    for top_p, kept in (
      (0.3, [[0], [3]]),
      (0.5, [[0], [2, 3]]),
      (0.75, [[0, 2], [1, 2, 3]]),
      (1.0, [[0, 1, 2, 3]] * 2),
    ):
      logits = generation._keep_top_p(jnp.log(probs), top_p)
      for row, places in zip(np.asarray(logits), kept, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row > -np.inf), places)


class BlocksTest(absltest.TestCase):
  """Generations that are longer than one call of the device's loop."""

  def setUp(self):
    super().setUp()
    block = generation._BLOCK
    self.addCleanup(setattr, generation, "_BLOCK", block)
    self.addCleanup(generation.decode_block.clear_cache)
    generation._BLOCK = 4
    generation.decode_block.clear_cache()

  def test_blocks_change_no_token(self):
    whole = generate(max_new_tokens=3)
    np.testing.assert_array_equal(generate(max_new_tokens=10)[:, :3], whole)
    sampled = generate(max_new_tokens=10, temperature=1.0)
    generation._BLOCK = 32
    generation.decode_block.clear_cache()
    np.testing.assert_array_equal(
      generate(max_new_tokens=10, temperature=1.0), sampled
    )

  def test_a_stop_token_ends_its_row_alone(self):
    free = generate(max_new_tokens=10)
    stop = int(free[0, 5])
    stopped = generate(max_new_tokens=10, stop_tokens=[stop])
    for row, expected in zip(stopped, free, strict=True):
      places = np.flatnonzero(expected == stop)
      end = places[0] + 1 if len(places) else 10
      np.testing.assert_array_equal(row[:end], expected[:end])
      np.testing.assert_array_equal(row[end:], generation.NO_TOKEN)

  def test_ends_when_all_rows_have(self):
    calls = mock.Mock(wraps=generation.decode_block)
    with mock.patch.object(generation, "decode_block", calls):
      tokens = generate(max_new_tokens=40, stop_tokens=range(64))
    self.assertEqual(calls.call_count, 1)
    np.testing.assert_array_equal(tokens[:, 1:], generation.NO_TOKEN)

  def test_an_interrupted_generation_returns_what_it_has(self):
    whole = generate(max_new_tokens=10)
    decode_block, calls = generation.decode_block, []

    def interrupt_the_second(*args):
      calls.append(args)
      if len(calls) == 2:
        raise KeyboardInterrupt
      return decode_block(*args)

    with mock.patch.object(generation, "decode_block", interrupt_the_second):
      tokens = generate(max_new_tokens=10)
    np.testing.assert_array_equal(tokens[:, :4], whole[:, :4])
    np.testing.assert_array_equal(tokens[:, 4:], generation.NO_TOKEN)


class CapacityTest(absltest.TestCase):
  def test_one_compilation_serves_all_lengths(self):
    expected = generate()
    programs = (generation.extend, generation.decode_block)
    for program in programs:
      program.clear_cache()
    for prompt, tokens in zip(prompts(), expected, strict=True):
      found = generate(prompts=[prompt], chunk_size=8, capacity=60)
      np.testing.assert_array_equal(found[0], tokens)
    self.assertEqual([program._cache_size() for program in programs], [1, 1])

  def test_holds_the_prompt_and_the_new_tokens(self):
    with self.assertRaisesRegex(
      ValueError, r"`capacity` must hold .*got capacity=45 for 40 \+ 6 tokens"
    ):
      generate(capacity=45)


class PrefillTest(parameterized.TestCase):
  def run_prefill(self, chunk_size, capacity=46, lengths=(20, 13)):
    config = toy.config("FSFS")
    return ic.prefill(
      ic.SparseTransformer(config),
      toy.params_for(config),
      toy.random_tokens(length=20),
      np.array(lengths),
      ic.init_cache(config, 2, capacity),
      chunk_size=chunk_size,
    )

  def test_chunks_give_the_logits_and_the_cache_of_one_pass(self):
    whole = self.run_prefill(None)
    chunked = self.run_prefill(10)
    tolerance = tolerances.tolerance("float32", 32 * 4)
    np.testing.assert_allclose(chunked.logits, whole.logits, **tolerance)
    np.testing.assert_array_equal(chunked.cache.lengths, [20, 13])
    rows, expected = (
      [*result.cache.kv_latent, *result.cache.index_keys]
      for result in (chunked, whole)
    )
    for a, b in zip(rows, expected, strict=True):
      # What lies beyond a row's real tokens is padding.
      np.testing.assert_allclose(a[0, :20], b[0, :20], **tolerance)
      np.testing.assert_allclose(a[1, :13], b[1, :13], **tolerance)

  @parameterized.parameters(0, -3)
  def test_chunk_size(self, chunk_size):
    with self.assertRaisesRegex(
      ValueError, f"`chunk_size` must be at least 1: got {chunk_size}"
    ):
      self.run_prefill(chunk_size)

  @parameterized.parameters(None, 4)
  def test_tokens_must_fit_in_the_cache(self, chunk_size):
    # Each chunk fits; rows beyond the capacity would be dropped in silence.
    with self.assertRaisesRegex(
      ValueError, r"must fit in `cache`.*got \[20, 13\] tokens.*capacity of 16"
    ):
      self.run_prefill(chunk_size, capacity=16)

  def test_appended_tokens_must_fit_too(self):
    config = toy.config("FSFS")
    held = self.run_prefill(None).cache
    with self.assertRaisesRegex(
      ValueError, r"got \[27, 1\] tokens behind \[20, 13\] for .* of 46"
    ):
      ic.prefill(
        ic.SparseTransformer(config),
        toy.params_for(config),
        toy.random_tokens(length=27),
        np.array([27, 1]),
        held,
      )

  @parameterized.parameters(
    ((2, 20), (20,), 2),
    ((2, 20), (5, 5, 5), 2),
    ((2, 20), (5, 5), 3),
    ((2, 0), (1, 1), 2),
  )
  def test_as_many_rows_everywhere(self, shape, lengths, rows):
    config = toy.config("FSFS")
    with (
      errors.unchecked(),
      self.assertRaisesRegex(
        ValueError, rf"`tokens` must be one or more rows.*cache of {rows} rows"
      ),
    ):
      ic.prefill(
        ic.SparseTransformer(config),
        toy.params_for(config),
        np.zeros(shape, np.int32),
        np.array(lengths, np.int32),
        ic.init_cache(config, rows, 46),
      )

  @parameterized.parameters(None, 99)
  def test_padding_may_be_wider_than_the_cache(self, chunk_size):
    config = toy.config("FSFS")
    tokens = np.pad(toy.random_tokens(length=20), ((0, 0), (0, 20)))
    logits, cache = ic.prefill(
      ic.SparseTransformer(config),
      toy.params_for(config),
      tokens,
      np.array([16, 13]),
      ic.init_cache(config, 2, 16),
      chunk_size=chunk_size,
    )
    np.testing.assert_array_equal(cache.lengths, [16, 13])
    expected = self.run_prefill(None, lengths=(16, 13)).logits
    tolerance = tolerances.tolerance("float32", 32 * 4)
    np.testing.assert_allclose(logits, expected, **tolerance)

  def test_real_tokens_are_ids(self):
    config = toy.config("FSFS")
    tokens = np.array([[5, 64, -1], [3, -7, 99]], np.int32)
    run = functools.partial(
      ic.prefill, ic.SparseTransformer(config), toy.params_for(config), tokens
    )
    with self.assertRaisesRegex(
      ValueError, r"ids from 0.*got \[64, -1\] for vocab_size=64"
    ):
      run(np.array([3, 1]), ic.init_cache(config, 2, 8))
    # Padding may hold anything.
    logits, _ = run(np.array([1, 1]), ic.init_cache(config, 2, 8))
    self.assertTrue(np.all(np.isfinite(logits)))

  @parameterized.parameters(((20, 0),), ((-1, 20),), ((21, 20),))
  def test_lengths(self, lengths):
    with self.assertRaisesRegex(
      ValueError, r"`lengths` must be from 1 to the 20 tokens of a row: got \["
    ):
      self.run_prefill(None, lengths=lengths)


class ErrorsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("no_prompt", {"prompts": []}, r"`prompts` must be one or more.*\[\]"),
    (
      "empty_prompt",
      {"prompts": [[1, 2], []]},
      r"at least one token: got lengths \[2, 0\]",
    ),
    ("no_tokens", {"max_new_tokens": 0}, "`max_new_tokens` .*1: got 0"),
    ("fewer", {"max_new_tokens": -2}, "`max_new_tokens` .*1: got -2"),
    ("cold", {"temperature": -0.5}, r"`temperature` must be 0 .*got -0\.5"),
    ("nan", {"temperature": float("nan")}, "`temperature` must be 0 .*got nan"),
    (
      "beyond_the_vocabulary",
      {"prompts": [[1], [3, 64]]},
      "below `vocab_size`: got ids from 1 to 64 for vocab_size=64",
    ),
    (
      "negative",
      {"prompts": [[63], [-1, 5]]},
      "below `vocab_size`: got ids from -1 to 63 for vocab_size=64",
    ),
    ("top_p", {"top_p": 0.0}, r"`top_p` must be above 0 .*got 0\.0"),
    (
      "stop_tokens",
      {"stop_tokens": [3, 64]},
      r"`stop_tokens` .*got \[64\] for vocab_size=64",
    ),
    ("chunk_size", {"chunk_size": 0}, "`chunk_size` must be at least 1: got 0"),
  )
  def test_says_the_rule_and_the_values(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      generate(**changes)

  def test_a_cache_beyond_the_memory_says_the_sum(self):
    device = mock.Mock()
    device.memory_stats.return_value = {
      "bytes_limit": 3 << 10,
      "bytes_in_use": 1 << 10,
    }
    with (
      mock.patch.object(cache.jax, "devices", lambda: [device]),
      self.assertRaisesRegex(
        ValueError, r"got 5 x 46 tokens x .* GiB are free"
      ),
    ):
      generate()

  @parameterized.parameters(
    # An int32 array would take 1.9 as 1.
    ([[1.9, 2.0]], "float64"),
    (["text"], "<U4"),
    ([[[1, 2], [3, 4]]], "int64"),
  )
  def test_tokens_are_integers(self, bad, dtype):
    with (
      errors.unchecked(),
      self.assertRaisesRegex(
        ValueError,
        f"`prompts` must hold token ids, a flat list .*got {dtype}.*prompt 1",
      ),
    ):
      generate(prompts=[[1], *bad])


if __name__ == "__main__":
  absltest.main()
