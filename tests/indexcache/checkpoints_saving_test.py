# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from absl.testing import absltest, parameterized
from flax import traverse_util

import indexcache_jax as ic
from indexcache_jax import checkpoints
from indexcache_jax.checkpoints import saving
from tests.indexcache import checkpoints_toy, toy


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.parent = checkpoints_toy.temporary_folder(self)
    self.folder = self.parent / "checkpoint"

  def names(self, folder=None):
    return sorted(os.listdir(folder or self.folder))


class RoundTripTest(CheckpointsTest):
  @parameterized.product(
    dtype=(jnp.float32, jnp.bfloat16),
    max_shard_bytes=(10**9, 40_000, 1),
  )
  def test_is_bit_equal(self, dtype, max_shard_bytes):
    config = toy.config("FSSF", attention_bias=True)
    params = checkpoints_toy.random_params(config, dtype)
    checkpoints.save_checkpoint(
      self.folder, config, params, max_shard_bytes=max_shard_bytes
    )
    found_config, found = checkpoints_toy.load(self.folder, dtype)
    self.assertEqual(
      found_config, config.replace(dtype=dtype, param_dtype=dtype)
    )
    checkpoints_toy.assert_bits_equal(self, params, found)
    self.assertEqual(
      checkpoints.load_config(self.folder).dtype, jnp.dtype(dtype)
    )

  @parameterized.parameters("small", "deepseek_v32")
  def test_table_of_names_covers_the_model(self, name):
    config = ic.PRESETS[name]().replace(num_hidden_layers=5)
    if name == "deepseek_v32":
      config = config.replace(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_attention_heads=2,
        n_routed_experts=16,
        n_shared_experts=2,
      )
    params = checkpoints_toy.random_params(config, config.param_dtype)
    checkpoints.save_checkpoint(self.folder, config, params)
    found_config, found = checkpoints_toy.load(self.folder, config.dtype)
    self.assertEqual(found_config, config)
    checkpoints_toy.assert_bits_equal(self, params, found)

  def test_names_and_orientation_are_the_published_ones(self):
    _, params = checkpoints_toy.save(self.folder)
    # Another reader of the format, and names written out by hand.
    tensors = safetensors.flax.load_file(self.folder / "model.safetensors")
    layer = params["layers_2"]
    for name, expected in {
      "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
      "model.norm.weight": params["norm"]["scale"],
      "lm_head.weight": params["lm_head"]["kernel"].T,
      "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": layer["self_attn"][
        "kv_a_proj_with_mqa"
      ]["kernel"].T,
      "model.layers.2.self_attn.indexer.k_norm.bias": layer["self_attn"][
        "indexer"
      ]["k_norm"]["bias"],
      "model.layers.2.mlp.gate.weight": layer["mlp"]["gate"]["kernel"].T,
      "model.layers.2.mlp.gate.e_score_correction_bias": layer["mlp"]["gate"][
        "e_score_correction_bias"
      ],
      "model.layers.2.mlp.experts.5.down_proj.weight": layer["mlp"]["experts"][
        "down_proj"
      ][5].T,
      "model.layers.2.mlp.shared_experts.up_proj.weight": layer["mlp"][
        "shared_experts"
      ]["up_proj"]["kernel"].T,
    }.items():
      np.testing.assert_array_equal(tensors[name], expected, err_msg=name)

  def test_shards_and_their_index(self):
    checkpoints_toy.save(self.folder, max_shard_bytes=60_000)
    names = [name for name in self.names() if name.startswith("model-")]
    self.assertGreater(len(names), 2)
    self.assertEqual(names[0], f"model-00001-of-{len(names):05d}.safetensors")
    index = json.loads(
      (self.folder / "model.safetensors.index.json").read_text()
    )
    self.assertEqual(sorted(set(index["weight_map"].values())), names)
    sizes = [
      sum(
        value.nbytes
        for value in checkpoints_toy.read_tensors(self.folder / name).values()
      )
      for name in names
    ]
    self.assertLessEqual(max(sizes), 60_000)
    self.assertEqual(index["metadata"]["total_size"], sum(sizes))

  def test_rounding_spares_what_decides_selections(self):
    _, params = checkpoints_toy.save(self.folder, dtype=jnp.bfloat16)
    for dtype in (jnp.bfloat16, jnp.float32):
      _, found = checkpoints_toy.load(self.folder, dtype)
      layer, own = found["layers_1"], params["layers_1"]
      for path in (
        ("mlp", "gate", "e_score_correction_bias"),
        ("self_attn", "indexer", "weights_proj", "kernel"),
      ):
        value, expected = layer, own
        for key in path:
          value, expected = value[key], expected[key]
        self.assertEqual(value.dtype, jnp.float32)
        np.testing.assert_array_equal(value, expected)
      kernel = layer["mlp"]["experts"]["up_proj"]
      self.assertEqual(kernel.dtype, dtype)
      np.testing.assert_array_equal(
        kernel.astype(jnp.float32),
        own["mlp"]["experts"]["up_proj"].astype(jnp.bfloat16),
      )

  def test_full_parameters_under_a_schedule(self):
    config = toy.config("FSFF")
    params = checkpoints_toy.random_params(toy.config())
    with self.assertLogs("absl", "INFO") as logs:
      checkpoints.save_checkpoint(self.folder, config, params)
    self.assertIn("Indexers of the shared layers under FSFF", logs.output[0])
    _, found = checkpoints_toy.load(self.folder)
    self.assertNotIn("indexer", found["layers_1"]["self_attn"])


class AtomicTest(CheckpointsTest):
  @parameterized.parameters(True, False)
  def test_interrupted_while_writing(self, is_there):
    if is_there:
      checkpoints_toy.save(self.folder)
      before = self.names()
    config = toy.config("FSSF")
    params = checkpoints_toy.random_params(config)
    with (
      mock.patch.object(saving, "_write_json", side_effect=KeyboardInterrupt),
      self.assertRaises(KeyboardInterrupt),
    ):
      checkpoints.save_checkpoint(self.folder, config, params, overwrite=True)
    self.assertEqual(
      self.names(self.parent), ["checkpoint"] if is_there else []
    )
    if is_there:
      self.assertEqual(self.names(), before)
      self.assertEqual(
        checkpoints.load_config(self.folder).schedule.pattern, "FFFF"
      )

  def test_interrupted_between_the_renames(self):
    checkpoints_toy.save(self.folder)
    rename = os.rename

    def fail(source, target):
      if str(source).endswith(".partial"):
        raise OSError("disk gone")
      rename(source, target)

    with (
      mock.patch.object(os, "rename", side_effect=fail),
      self.assertRaisesRegex(OSError, "disk gone"),
    ):
      checkpoints_toy.save(self.folder, "FSSF", overwrite=True)
    self.assertEqual(self.names(self.parent), ["checkpoint"])
    self.assertEqual(
      checkpoints.load_config(self.folder).schedule.pattern, "FFFF"
    )

  def test_a_killed_swap_can_be_found_again(self):
    checkpoints_toy.save(self.folder)
    os.rename(self.folder, self.parent / ".checkpoint.0123abcd.old")
    with self.assertRaisesRegex(ValueError, "0123abcd.old is what it held"):
      checkpoints.load_config(self.folder)

  def test_overwrites_weights_and_keeps_the_tokenizer(self):
    checkpoints_toy.save(self.folder, max_shard_bytes=60_000)
    (self.folder / "tokenizer.json").write_text("{}")
    config, params = checkpoints_toy.save(self.folder, "FSSF", overwrite=True)
    self.assertEqual(
      self.names(), ["config.json", "model.safetensors", "tokenizer.json"]
    )
    self.assertEqual(self.names(self.parent), ["checkpoint"])
    found_config, found = checkpoints_toy.load(self.folder)
    self.assertEqual(found_config, config)
    checkpoints_toy.assert_bits_equal(self, params, found)

  def test_makes_parents_and_takes_an_empty_folder(self):
    folder = self.parent / "a" / "b"
    folder.mkdir(parents=True)
    checkpoints_toy.save(folder)
    checkpoints_toy.save(self.parent / "c" / "d")

  def test_follows_a_link_to_its_folder(self):
    checkpoints_toy.save(self.parent / "real")
    self.folder.symlink_to("real")
    checkpoints_toy.save(self.folder, "FSSF", overwrite=True)
    self.assertTrue(self.folder.is_symlink())
    config = checkpoints.load_config(self.parent / "real")
    self.assertEqual(config.schedule.pattern, "FSSF")


class RefusalTest(CheckpointsTest):
  def test_existing_folders(self):
    self.folder.mkdir()
    (self.folder / "notes").write_text("mine")
    with self.assertRaisesRegex(ValueError, "new or empty: .* holds 1 files"):
      checkpoints_toy.save(self.folder)
    with self.assertRaisesRegex(ValueError, "has no config.json"):
      checkpoints_toy.save(self.folder, overwrite=True)
    with self.assertRaisesRegex(ValueError, "must be a folder: .* is a file"):
      checkpoints_toy.save(self.folder / "notes", overwrite=True)
    self.assertEqual(self.names(), ["notes"])

  def test_parameters(self):
    config = toy.config("FSSF")
    flat = traverse_util.flatten_dict(checkpoints_toy.random_params(config))
    del flat["norm", "scale"]
    flat["more", "kernel"] = jnp.zeros(3)
    flat["lm_head", "kernel"] = jnp.zeros((2, 3))
    flat["embed_tokens", "embedding"] = jnp.zeros((64, 32), jnp.float16)
    with self.assertRaises(checkpoints.CheckpointError) as error:
      checkpoints.save_checkpoint(
        self.folder, config, traverse_util.unflatten_dict(flat)
      )
    message = str(error.exception)
    for part in (
      "missing parameters (1):\n  norm/scale: expected shape (32,)",
      "unexpected parameters (1):\n  more/kernel",
      "lm_head/kernel: expected shape (32, 64), found (2, 3)",
      "embed_tokens/embedding: expected float32 or bfloat16, found float16",
    ):
      self.assertIn(part, message)
    self.assertEqual(self.names(self.parent), [])

  @parameterized.parameters(
    ({"dtype": jnp.float16}, "`dtype` must be float32, bfloat16 or None"),
    ({"max_shard_bytes": 0}, "`max_shard_bytes` must be positive: got 0"),
  )
  def test_arguments(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      checkpoints_toy.save(self.folder, **kwargs)


class MemoryTest(CheckpointsTest):
  def test_leaves_no_host_copy_in_the_parameters(self):
    config = toy.config()
    params = checkpoints_toy.random_params(config)
    checkpoints.save_checkpoint(self.folder, config, params)
    self.assertTrue(
      all(leaf._npy_value is None for leaf in jax.tree.leaves(params))
    )


if __name__ == "__main__":
  absltest.main()
