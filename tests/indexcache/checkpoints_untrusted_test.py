# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import pickle

import numpy as np
from absl.testing import absltest, parameterized

from indexcache_jax import checkpoints
from indexcache_jax.checkpoints import safetensors_files
from tests.indexcache import checkpoints_toy

INDEX = "model.safetensors.index.json"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


class Bomb:
  """Leaves a file behind when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.parent = checkpoints_toy.temporary_folder(self)
    self.folder = self.parent / "checkpoint"

  def assert_refused(self, message):
    with self.assertRaisesRegex(checkpoints.CheckpointError, message):
      checkpoints_toy.load(self.folder)


class HeaderTest(CheckpointsTest):
  @parameterized.parameters(
    ({"a": entry(), "b": entry(offsets=(4, 12))}, "begins at byte 4 .*overlap"),
    ({"a": entry(), "b": entry(offsets=(0, 8))}, "begins at byte 0 .*overlap"),
    ({"a": entry(), "b": entry(offsets=(12, 20))}, "leave a gap"),
    ({"a": entry(offsets=(4, 12))}, "leave a gap"),
    ({"a": entry(shape=(4,), offsets=(0, 16))}, "got .*; it is truncated"),
    ({"a": entry(shape=(1,), offsets=(0, 4))}, "followed by other bytes"),
    ({}, "followed by other bytes"),
    ({"a": entry(shape=(3,))}, "as many bytes as its shape: .* 12 bytes"),
    ({"a": entry(offsets=(8, 0))}, "as many bytes as its shape"),
    # 2^62 floats: nothing of that size may be asked for.
    ({"a": entry(shape=(2**31, 2**31))}, "as many bytes as its shape"),
    ({"a": entry(shape=(2**62,), offsets=(0, 2**62 * 4))}, "two data_offsets"),
    ({"a": entry(shape=(-2,))}, "a shape of at most 8 sizes of 0 or more"),
    ({"a": entry(shape=(2.0,))}, "a shape of at most 8 sizes"),
    ({"a": entry(shape=(True, 2))}, "a shape of at most 8 sizes"),
    ({"a": entry(shape=(1,) * 9)}, "a shape of at most 8 sizes"),
    ({"a": entry() | {"shape": 2}}, "a shape of at most 8 sizes"),
    ({"a": entry(offsets=(0, 8, 8))}, "two data_offsets of 0 or more"),
    ({"a": entry(offsets=(-8, 0))}, "two data_offsets of 0 or more"),
    ({"a": entry(dtype="F4")}, "a dtype of .*got 'F4'"),
    ({"a": entry(dtype=["F32"])}, "a dtype of .*got .'F32'."),
    ({"a": entry() | {"more": 1}}, "must have dtype, shape and data_offsets"),
    ({"a": {"dtype": "F32"}}, "must have dtype, shape and data_offsets"),
    ({"a": [1]}, "must have dtype, shape and data_offsets"),
    (b"[]", "the header of .* must be a JSON object: got a list"),
    (b"{", "the header of .* must be JSON"),
    (b"\xff", "the header of .* must be JSON"),
    (b'{"a": 1, "a": 1}', "the header of .* twice: got 'a'"),
    (b"[" * 100_000, "must be JSON: .*recursion"),
  )
  def test_faults(self, header, message):
    checkpoints_toy.save(self.folder)
    (self.folder / "model.safetensors").write_bytes(
      checkpoints_toy.header_bytes(header) + bytes(8)
    )
    self.assert_refused(message)

  @parameterized.parameters(
    (b"", "length of its header.*got b''"),
    (b"\x01\x00", "length of its header"),
    (b"\xff" * 8, "length of its header.*got 18446744073709551615"),
    ((2**30).to_bytes(8, "little") + b"{}", "got 1073741824 in a file of 10"),
    ((3).to_bytes(8, "little") + b"{}", "got 3 in a file of 10 bytes"),
  )
  def test_lengths(self, content, message):
    checkpoints_toy.save(self.folder)
    (self.folder / "model.safetensors").write_bytes(content)
    self.assert_refused(message)

  def test_truncated(self):
    checkpoints_toy.save(self.folder)
    path = self.folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    self.assert_refused("it is truncated")

  def test_truncated_between_the_check_and_the_read(self):
    checkpoints_toy.save(self.folder)
    path = self.folder / "model.safetensors"
    info = safetensors_files.find_tensors(self.folder)["lm_head.weight"]
    os.truncate(path, info.offset + 5)
    with self.assertRaisesRegex(ValueError, "must not change.*got 5 of 8192"):
      safetensors_files.read_rows(info)

  def test_metadata_is_ignored(self):
    checkpoints_toy.save(self.folder)
    path = self.folder / "model.safetensors"
    tensors = checkpoints_toy.read_tensors(path)
    checkpoints_toy.write_tensors(path, tensors)
    self.assertNotIn(b"__metadata__", path.read_bytes()[:100])
    checkpoints_toy.load(self.folder)


class IndexTest(CheckpointsTest):
  def setUp(self):
    super().setUp()
    checkpoints_toy.save(self.folder, max_shard_bytes=200_000)
    self.index = json.loads((self.folder / INDEX).read_text())
    self.shards = sorted(set(self.index["weight_map"].values()))

  def write(self, content):
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
    (self.folder / INDEX).write_bytes(content)

  @parameterized.parameters(
    ("../secret.safetensors", "plain names within its folder: got '../secr"),
    ("/etc/secret.safetensors", "plain names within its folder"),
    ("a/b.safetensors", "plain names within its folder"),
    ("a\\b.safetensors", "plain names within its folder"),
    ("a\0b.safetensors", "plain names within its folder"),
    (".safetensors", "plain names within its folder"),
    ("gone.safetensors", "must have the file 'gone.safetensors'"),
    ("x" * 300 + ".safetensors", "must have the file 'xxx"),
    ("weights.bin", "must name \\*.safetensors files: got 'weights.bin'"),
    ("/dev/zero", "must name \\*.safetensors files"),
  )
  def test_names(self, name, message):
    (self.parent / "secret.safetensors").write_bytes(b"")
    self.index["weight_map"]["lm_head.weight"] = name
    self.write(self.index)
    self.assert_refused(message)

  @parameterized.parameters(
    (b"{", "must be JSON"),
    (b"[]", "must be a JSON object"),
    (b'{"weight_map": {"a": "x", "a": "y"}}', "twice: got 'a'"),
    (b"{}", "`weight_map` in .* must name a shard for each tensor: got None"),
    (b'{"weight_map": {}}', "must name a shard for each tensor"),
    (b'{"weight_map": ["x"]}', "must name a shard for each tensor"),
    (b'{"weight_map": {"a": 1}}', "must name a shard for each tensor"),
  )
  def test_content(self, content, message):
    self.write(content)
    self.assert_refused(message)

  def test_disagreements_are_listed(self):
    weight_map = self.index["weight_map"]
    first, last = self.shards[0], self.shards[-1]
    self.assertEqual(weight_map["lm_head.weight"], last)
    weight_map["lm_head.weight"] = first
    weight_map["ghost"] = first
    del weight_map["model.norm.weight"]
    self.write(self.index)
    self.assert_refused(
      f"'ghost': {first} by the index, in no shard\n"
      f"  'lm_head.weight': {first} by the index, found in {last}\n"
      f"  'model.norm.weight': nowhere by the index, found in {last}"
    )

  def test_a_tensor_in_two_shards(self):
    path = self.folder / self.shards[0]
    tensors = checkpoints_toy.read_tensors(path)
    tensors["lm_head.weight"] = np.zeros((64, 32), np.float32)
    checkpoints_toy.write_tensors(path, tensors)
    self.assert_refused("in one shard: got 'lm_head.weight' in model-00001-of")

  def test_shards_without_an_index(self):
    (self.folder / INDEX).unlink()
    checkpoints_toy.load(self.folder)

  def test_a_stale_single_file(self):
    (self.folder / "model.safetensors").write_bytes(b"")
    self.assert_refused("has both, and the index does not name the file")


class FolderTest(CheckpointsTest):
  def test_links_within_the_folder_are_followed(self):
    checkpoints_toy.save(self.folder)
    (self.folder / "model.safetensors").rename(self.folder / "blob")
    (self.folder / "model.safetensors").symlink_to("blob")
    checkpoints_toy.load(self.folder)

  @parameterized.parameters("config.json", "model.safetensors")
  def test_links_out_of_the_folder_are_not(self, name):
    checkpoints_toy.save(self.folder)
    (self.folder / name).rename(self.parent / "blob")
    (self.folder / name).symlink_to("../blob")
    self.assert_refused("must stay within its folder: .* cp -rL ")

  def test_an_index_linked_out_of_the_folder(self):
    checkpoints_toy.save(self.folder, max_shard_bytes=200_000)
    (self.folder / INDEX).rename(self.parent / "blob")
    (self.folder / INDEX).symlink_to("../blob")
    self.assert_refused("must stay within its folder")

  def test_the_folder_itself_may_be_a_link(self):
    checkpoints_toy.save(self.parent / "real")
    self.folder.symlink_to("real")
    checkpoints_toy.load(self.folder)

  def test_loops_pipes_and_folders(self):
    checkpoints_toy.save(self.folder)
    path = self.folder / "model.safetensors"
    path.unlink()
    path.symlink_to("model.safetensors")
    self.assert_refused("must have the file 'model.safetensors'")
    path.unlink()
    os.mkfifo(path)
    self.assert_refused("must be regular files")
    path.unlink()
    path.mkdir()
    self.assert_refused("must be regular files")

  def test_pickles_are_never_read(self):
    checkpoints_toy.save(self.folder)
    (self.folder / "model.safetensors").unlink()
    mark = self.parent / "mark"
    content = pickle.dumps(Bomb(mark))
    for name in ("pytorch_model.bin", "model.pt"):
      (self.folder / name).write_bytes(content)
    self.assert_refused("must hold \\*.safetensors: got none .*never read")
    (self.folder / "model.safetensors").write_bytes(content)
    self.assert_refused("no safetensors file")
    self.assertFalse(mark.exists())
    pickle.loads(content)
    self.assertTrue(mark.exists())

  def test_paths(self):
    self.assert_refused("folder: got .*checkpoint', which does not exist")
    self.folder.write_text("")
    self.assert_refused("which is a file")
    self.folder.unlink()
    self.folder.mkdir()
    self.assert_refused("must have the file 'config.json'")

  def test_a_config_is_checked_before_the_weights(self):
    checkpoints_toy.save(self.folder)
    checkpoints_toy.edit_config(self.folder, hidden_size=2**40)
    self.assert_refused("`hidden_size` must be an integer from 1 to 1048576")


if __name__ == "__main__":
  absltest.main()
