# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np
import tokenizers
from absl.testing import absltest

from indexcache_jax import text


def temporary_folder(test):
  folder = tempfile.TemporaryDirectory()
  test.addCleanup(folder.cleanup)
  return pathlib.Path(folder.name)


class FilesTest(absltest.TestCase):
  def test_standard_library_is_there_and_split_by_name(self):
    files = text.standard_library_files()
    self.assertGreater(len(files), 100)
    training, held_out = text.split_files(files)
    self.assertCountEqual(training + held_out, files)
    self.assertBetween(len(held_out) / len(files), 0.05, 0.2)
    moved = [
      pathlib.Path("/elsewhere") / path.parent.name / path.name
      for path in files
    ]
    _, moved_held_out = text.split_files(moved)
    self.assertEqual(
      [path.name for path in moved_held_out], [path.name for path in held_out]
    )

  def test_packages(self):
    files = text.package_files(["numpy", "absl"])
    parents = {path.parent.name for path in files}
    self.assertContainsSubset({"numpy", "absl"}, parents)
    self.assertNoCommonElements({"tests"}, parents)
    with self.assertRaisesRegex(
      ValueError, "`names` must be installed packages: got 'no_such_one'"
    ):
      text.package_files(["no_such_one"])

  def test_expands_globs(self):
    folder = temporary_folder(self)
    for name in ("b.txt", "a.txt", "c.md"):
      (folder / name).write_text(name)
    found = text.expand_files([str(folder / "*.txt")])
    self.assertEqual([path.name for path in found], ["a.txt", "b.txt"])
    (folder / "below").mkdir()
    (folder / "below" / "d.py").write_text("d")
    (folder / "below" / "e.bin").write_bytes(b"e")
    found = text.expand_files([str(folder)])
    self.assertEqual(
      [path.name for path in found], ["a.txt", "b.txt", "d.py", "c.md"]
    )
    with self.assertRaisesRegex(ValueError, "matches no file"):
      text.expand_files([str(folder / "*.rst")])


class TokensTest(absltest.TestCase):
  def test_bytes_round_trip(self):
    self.assertEqual(text.decode_bytes(text.encode_bytes("naïve ∑")), "naïve ∑")
    self.assertEqual(text.decode_bytes([0xFF]), "\ufffd")

  def test_loads_up_to_a_limit(self):
    folder = temporary_folder(self)
    (folder / "a").write_text("abc")
    (folder / "b").write_text("defg")
    files = [folder / "a", folder / "b"]
    tokens = text.load_tokens(files, text.encode_bytes)
    self.assertEqual(text.decode_bytes(tokens), "abcdefg")
    self.assertLen(text.load_tokens(files, text.encode_bytes, 5), 5)
    (folder / "empty").write_text("")
    with self.assertRaisesRegex(ValueError, "1 files without a token"):
      text.load_tokens([folder / "empty"], text.encode_bytes)

  def test_windows(self):
    tokens = np.arange(10, dtype=np.int32)
    spread = text.spread_windows(tokens, 3, 4)
    np.testing.assert_array_equal(spread[:, 0], [0, 3, 6])
    rng = np.random.default_rng(0)
    drawn = text.random_windows(tokens, rng, 50, 4)
    self.assertEqual(set(drawn[:, 0].tolist()), set(range(7)))
    with self.assertRaisesRegex(ValueError, "10 tokens for a context of 11"):
      text.spread_windows(tokens, 1, 11)

  def test_encoder_needs_a_tokenizer_above_the_bytes(self):
    folder = temporary_folder(self)
    self.assertIs(text.load_encoder(folder, 256), text.encode_bytes)
    self.assertIs(text.load_decoder(folder, 256), text.decode_bytes)
    for load in (text.load_encoder, text.load_decoder):
      with self.assertRaisesRegex(ValueError, "vocab_size=1000 and no"):
        load(folder, 1000)

  def test_reads_the_checkpoints_tokenizer(self):
    folder = temporary_folder(self)
    vocab = {"<end>": 0, "index": 1, "cache": 2}
    tokenizer = tokenizers.Tokenizer(
      tokenizers.models.WordLevel(vocab, unk_token="<end>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    # A tokenizer is taken even for a vocabulary as large as that of bytes.
    for vocab_size in (3, 256):
      encode = text.load_encoder(folder, vocab_size)
      decode = text.load_decoder(folder, vocab_size)
      self.assertEqual(encode("cache index"), [2, 1])
      self.assertEqual(decode(np.array([2, 1, 0])), "cache index <end>")

  def test_a_tokenizer_needs_its_package(self):
    folder = temporary_folder(self)
    (folder / "tokenizer.json").write_text("{}")
    with (
      mock.patch.dict(sys.modules, {"tokenizers": None}),
      self.assertRaisesRegex(ValueError, "pip install tokenizers"),
    ):
      text.load_decoder(folder, 256)


if __name__ == "__main__":
  absltest.main()
