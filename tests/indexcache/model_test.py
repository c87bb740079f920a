# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import itertools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import attention
from indexcache_jax import cache as cache_lib
from tests import tolerances
from tests.indexcache import toy

SCHEDULES = ("FFFF", "FSFS", "FSSS", "FFSF")
LENGTH = toy.LENGTH
full_params, params_for = toy.full_params, toy.params_for
random_tokens, forward, tiny = toy.random_tokens, toy.forward, toy.config


class StaticScheduleTest(parameterized.TestCase):
  @parameterized.parameters(*SCHEDULES)
  def test_traces_one_indexer_a_full_layer(self, pattern):
    config = tiny(pattern)
    with mock.patch.object(
      attention, "indexer_topk", wraps=attention.indexer_topk
    ) as traced:
      jax.eval_shape(
        ic.SparseTransformer(config).apply,
        {"params": params_for(config)},
        random_tokens(),
      )
    self.assertEqual(traced.call_count, config.schedule.num_full)

  @parameterized.parameters(*SCHEDULES)
  def test_shared_layer_owns_no_indexer_parameters(self, pattern):
    config = tiny(pattern)
    shapes = jax.eval_shape(
      ic.SparseTransformer(config).init, jax.random.key(0), random_tokens()
    )["params"]
    owners = "".join(
      "F" if "indexer" in shapes[f"layers_{layer}"]["self_attn"] else "S"
      for layer in range(4)
    )
    self.assertEqual(owners, pattern)

  def test_shared_layer_attends_to_its_source_layers_selection(self):
    config = tiny("FSFS")
    _, aux = forward(config, params_for(config), random_tokens())
    chex.assert_trees_all_equal(aux.topk_indices[1], aux.topk_indices[0])
    chex.assert_trees_all_equal(aux.topk_indices[3], aux.topk_indices[2])
    self.assertFalse(np.array_equal(aux.topk_indices[2], aux.topk_indices[0]))

  def test_schedule_changes_the_logits_above_index_topk_only(self):
    full, shared = tiny(), tiny("FSSS")
    for length, equal in ((8, True), (LENGTH, False)):
      tokens = random_tokens(length=length)
      a, _ = forward(full, full_params(), tokens)
      b, _ = forward(shared, params_for(shared), tokens)
      self.assertEqual(bool(np.allclose(a, b, atol=1e-4)), equal)

  def test_selection_is_causal_and_ascending(self):
    config = tiny()
    _, aux = forward(config, full_params(), random_tokens())
    for indices in map(np.asarray, aux.topk_indices):
      for t in range(LENGTH):
        row = indices[0, t]
        valid = row[row >= 0]
        self.assertLen(valid, min(t + 1, config.index_topk))
        self.assertTrue(np.all(np.diff(valid) > 0))
        self.assertTrue(np.all(valid <= t))
        self.assertTrue(np.all(row[len(valid) :] == -1))

  def test_sparse_equals_dense_when_index_topk_covers_all(self):
    config = tiny(index_topk=LENGTH + 3)
    sparse, _ = forward(config, full_params(), random_tokens())
    dense, _ = forward(config, full_params(), random_tokens(), kind="dense")
    np.testing.assert_allclose(
      sparse, dense, **tolerances.tolerance("float32", 32 * 4)
    )

  def test_run_to_run_bit_equal(self):
    config = tiny("FSFS")
    first, _ = forward(config, params_for(config), random_tokens())
    second, _ = forward(config, params_for(config), random_tokens())
    np.testing.assert_array_equal(first, second)

  def test_bfloat16_is_close_and_logits_are_float32(self):
    # Dense MLPs and every key: a flipped expert or key is no rounding error.
    config = tiny(index_topk=LENGTH, mlp_layer_types=("dense",) * 4)
    tokens = random_tokens()
    params = jax.jit(ic.SparseTransformer(config).init)(
      jax.random.key(1), tokens
    )["params"]
    wide, _ = forward(config, params, tokens)
    narrow, aux = forward(config.replace(dtype=jnp.bfloat16), params, tokens)
    self.assertEqual(narrow.dtype, jnp.float32)
    self.assertEqual(aux.attention_inputs[0].kv_latent.dtype, jnp.bfloat16)
    scale = float(jnp.max(jnp.abs(wide)))
    np.testing.assert_allclose(
      narrow / scale, wide / scale, **tolerances.tolerance("bfloat16", 16)
    )


class EmbeddingTest(absltest.TestCase):
  def test_gradient_of_a_frequent_token_in_bfloat16(self):
    """4096 terms of one sign: a sum in bfloat16 stops growing at 256 terms."""
    config = tiny("FFFF").replace(dtype=jnp.bfloat16)
    model, params = ic.SparseTransformer(config), full_params()
    tokens = jnp.zeros((1, 4096), jnp.int32)

    def total(params):
      return jnp.sum(model.apply({"params": params}, tokens, method="embed"))

    grads = jax.grad(total)(params)["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(grads[0], 4096)


class RuntimeScheduleTest(parameterized.TestCase):
  def test_one_compilation_serves_every_schedule(self):
    config = tiny()
    model = ic.SparseTransformer(config)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, tokens, runtime_schedule):
      logits, aux = model.apply(
        {"params": params}, tokens, runtime_schedule=runtime_schedule
      )
      return logits, aux.topk_indices

    for pattern in SCHEDULES:
      static = tiny(pattern)
      flags = jnp.array([letter == "F" for letter in pattern], jnp.int32)
      logits, topk_indices = run(full_params(), random_tokens(), flags)
      expected, aux = forward(static, params_for(static), random_tokens())
      np.testing.assert_allclose(
        logits, expected, **tolerances.tolerance("float32", 32 * 4)
      )
      chex.assert_trees_all_equal(topk_indices, aux.topk_indices)

  def test_a_layer_shared_at_run_time_runs_no_indexer(self):
    calls = []
    original = attention.indexer_topk

    def counting(*args, **kwargs):
      jax.debug.callback(lambda: calls.append(1))
      return original(*args, **kwargs)

    with mock.patch.object(attention, "indexer_topk", counting):
      model = ic.SparseTransformer(tiny())
      logits, _ = jax.jit(model.apply)(
        {"params": full_params()},
        random_tokens(),
        runtime_schedule=jnp.array([1, 0, 1, 0]),
      )
      jax.block_until_ready(logits)
      jax.effects_barrier()
    self.assertLen(calls, 2)

  def test_needs_all_indexers(self):
    config = tiny("FSFS")
    with self.assertRaisesRegex(ValueError, "indexer in every layer.*'FSFS'"):
      forward(
        config,
        params_for(config),
        random_tokens(),
        runtime_schedule=jnp.ones(4, jnp.int32),
      )

  def test_needs_one_entry_a_layer(self):
    with self.assertRaisesRegex(ValueError, r"shape \(3,\) for 4 layers"):
      forward(
        tiny(),
        full_params(),
        random_tokens(),
        runtime_schedule=jnp.ones(3, jnp.int32),
      )

  def test_excludes_dense_attention(self):
    with self.assertRaisesRegex(ValueError, "attention_kind='dense'"):
      forward(
        tiny(),
        full_params(),
        random_tokens(),
        kind="dense",
        runtime_schedule=jnp.ones(4, jnp.int32),
      )


class CacheTest(parameterized.TestCase):
  @parameterized.product(pattern=SCHEDULES, length=(6, LENGTH))
  def test_prefill_then_decode_gives_the_logits_of_one_pass(
    self, pattern, length
  ):
    config = tiny(pattern)
    params = params_for(config)
    tokens = random_tokens(length=length)
    expected, _ = forward(config, params, tokens)
    start = length // 2
    cache = ic.init_cache(config, 2, length)
    logits, aux = forward(config, params, tokens[:, :start], cache=cache)
    collected = [logits]
    for t in range(start, length):
      logits, aux = forward(
        config, params, tokens[:, t : t + 1], cache=aux.cache
      )
      collected.append(logits)
    np.testing.assert_allclose(
      jnp.concatenate(collected, axis=1),
      expected,
      **tolerances.tolerance("float32", 32 * 4),
    )
    np.testing.assert_array_equal(aux.cache.lengths, [length, length])

  @parameterized.parameters(*SCHEDULES)
  def test_rows_of_different_lengths_prefilled_in_chunks(self, pattern):
    config = tiny(pattern)
    params = params_for(config)
    tokens = random_tokens(batch=3)
    lengths = np.array([LENGTH, 13, 5])
    result = ic.prefill(
      ic.SparseTransformer(config),
      params,
      tokens,
      lengths,
      ic.init_cache(config, 3, LENGTH + 4),
      chunk_size=11,
    )
    logits, cache = result.logits, result.cache
    new = random_tokens(batch=3, length=3, seed=5)
    whole = np.zeros((3, LENGTH + 3), np.int32)
    for row, length in enumerate(lengths):
      whole[row, :length] = tokens[row, :length]
      whole[row, length : length + 3] = new[row]
    expected, _ = forward(config, params, jnp.asarray(whole))
    for step in range(4):
      for row, length in enumerate(lengths):
        np.testing.assert_allclose(
          logits[row],
          expected[row, length + step - 1],
          **tolerances.tolerance("float32", 32 * 4),
        )
      if step < 3:
        logits, aux = forward(
          config, params, new[:, step : step + 1], cache=cache
        )
        logits, cache = logits[:, 0], aux.cache

  def test_index_keys_are_kept_for_full_layers_only(self):
    config = tiny("FSSF")
    cache = ic.init_cache(config, 2, 16)
    self.assertLen(cache.kv_latent, 4)
    self.assertLen(cache.index_keys, 2)
    self.assertEqual(cache.num_bytes, 2 * 16 * 4 * (4 * 24 + 2 * 16))

  def test_a_row_beyond_the_capacity_is_dropped(self):
    rows = cache_lib.write_rows(
      jnp.zeros((1, 3, 1)), jnp.ones((1, 2, 1)), jnp.array([[2, 3]])
    )
    np.testing.assert_array_equal(rows[0, :, 0], [0, 0, 1])

  def test_tokens_must_fit(self):
    config = tiny()
    with self.assertRaisesRegex(ValueError, "5 tokens for a capacity of 4"):
      forward(
        config,
        full_params(),
        random_tokens(length=5),
        cache=ic.init_cache(config, 2, 4),
      )

  def test_capacity_must_be_positive(self):
    with self.assertRaisesRegex(ValueError, "batch_size=2, capacity=0"):
      ic.init_cache(tiny(), 2, 0)


class SegmentsTest(parameterized.TestCase):
  @parameterized.parameters(*SCHEDULES)
  def test_packed_segments_equal_separate_sequences(self, pattern):
    config = tiny(pattern)
    params = params_for(config)
    tokens = random_tokens(batch=1)
    bounds = (0, 17, 21, LENGTH)
    segment_ids = np.zeros((1, LENGTH), np.int32)
    for number in range(3):
      segment_ids[:, bounds[number] : bounds[number + 1]] = 7 - number
    packed, _ = forward(
      config, params, tokens, segment_ids=jnp.asarray(segment_ids)
    )
    for start, stop in itertools.pairwise(bounds):
      alone, _ = forward(config, params, tokens[:, start:stop])
      np.testing.assert_allclose(
        packed[:, start:stop],
        alone,
        **tolerances.tolerance("float32", 32 * 4),
      )

  def test_exclude_a_cache(self):
    config = tiny()
    tokens = random_tokens(length=4)
    with self.assertRaisesRegex(ValueError, "one sequence a row"):
      forward(
        config,
        full_params(),
        tokens,
        segment_ids=jnp.zeros_like(tokens),
        cache=ic.init_cache(config, 2, 4),
      )


class LogitsForTest(absltest.TestCase):
  def test_last_is_each_rows_last_real_token(self):
    config = tiny()
    tokens = random_tokens()
    every, _ = forward(config, full_params(), tokens)
    last, _ = ic.SparseTransformer(config).apply(
      {"params": full_params()},
      tokens,
      lengths=jnp.array([LENGTH, 9]),
      logits_for="last",
    )
    chex.assert_shape(last, (2, 1, 64))
    tolerance = tolerances.tolerance("float32", 32 * 4)
    np.testing.assert_allclose(last[0, 0], every[0, -1], **tolerance)
    np.testing.assert_allclose(last[1, 0], every[1, 8], **tolerance)


class MemoryTest(absltest.TestCase):
  def test_prefill_holds_no_array_of_queries_by_keys(self):
    length = 1 << 15
    config = tiny("FSSS", max_position_embeddings=length)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    lowered = jax.jit(
      lambda params, tokens: ic.SparseTransformer(config).apply(
        {"params": params}, tokens, logits_for="last"
      )[0]
    ).lower(params_for(config), tokens)
    stats = lowered.compile().memory_analysis()
    # One T x S float32 array would be 4 GiB; the kernels may take 1 GiB.
    self.assertLess(stats.temp_size_in_bytes, 1.5 * 2**30)


if __name__ == "__main__":
  absltest.main()
