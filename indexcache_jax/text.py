# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Real text as token ids: files, tokenizer, split, windows.

Every function is deterministic, and a training batch depends on the seed and
the step alone, so that a resumed run needs no state of its data.
"""

import glob
import importlib.util
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int, Int32

# Text -> token ids.
Encode = Callable[[str], Sequence[int] | Int32[np.ndarray, " tokens"]]
# Token ids -> text.
Decode = Callable[[Iterable[int] | Int[np.ndarray, " tokens"]], str]

_BYTE_VOCAB = 256
# Of the files that are read where a folder is named.
_SUFFIXES = (".md", ".py", ".rst", ".txt")
# Folders that are not read: other packages, and tests, which repeat themselves.
_SKIPPED = frozenset(
  ("site-packages", "dist-packages", "test", "tests", "idle_test")
)
# One file in this many is held out of training and calibration.
_HELD_OUT_EVERY = 10


def standard_library_files() -> list[pathlib.Path]:
  """Source files of this Python's standard library, its tests left out.

  Real text that every machine has: about 10 MB of English and code.
  """
  return _source_files(pathlib.Path(sysconfig.get_path("stdlib")))


def package_files(names: Sequence[str]) -> list[pathlib.Path]:
  """Source files of installed packages, their tests left out.

  What a project requires is on every machine that runs it; which versions
  decides what is read.

  Args:
    names: as in an import statement.

  Raises:
    ValueError: a package is not installed, or has no folder.
  """
  files = []
  for name in names:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
      raise ValueError(
        f"`names` must be installed packages: got {name!r}. Install it, or read"
        " other text."
      )
    for location in spec.submodule_search_locations:
      files += _source_files(pathlib.Path(location))
  return files


def _source_files(root):
  """Python files below a folder, sorted."""
  return [
    path
    for path in sorted(root.rglob("*.py"))
    if not _SKIPPED & set(path.relative_to(root).parts)
  ]


def expand_files(patterns: Sequence[str]) -> list[pathlib.Path]:
  """Files that match any of the globs, sorted; each pattern must match.

  A folder stands for the files below it that end in .md, .py, .rst or .txt.
  """
  found = set()
  for pattern in patterns:
    matches = [
      path
      for match in glob.glob(os.path.expanduser(pattern), recursive=True)
      for path in _files_of(pathlib.Path(match))
    ]
    if not matches:
      raise ValueError(
        "`text` must name files, folders of text or globs that exist: got"
        f" {pattern!r}, which matches no file from {os.getcwd()!r}."
      )
    found.update(matches)
  return sorted(found)


def _files_of(path):
  if path.is_file():
    return [path]
  return [
    below
    for below in path.rglob("*")
    if below.suffix in _SUFFIXES and below.is_file()
  ]


def split_files(
  files: Sequence[pathlib.Path],
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """Splits files into (training, held out) by a hash of their last two names.

  Independent of where the files lie and of which others exist, so a model
  trained on one machine is tested on another with text that it never saw.
  """
  held_out = [path for path in files if _hash(path) % _HELD_OUT_EVERY == 0]
  training = [path for path in files if _hash(path) % _HELD_OUT_EVERY]
  return training, held_out


def load_encoder(checkpoint: str | os.PathLike, vocab_size: int) -> Encode:
  """Returns the checkpoint's tokenizer, or bytes for a vocabulary of 256.

  Args:
    checkpoint: folder that may hold tokenizer.json.
    vocab_size: of the model.
  """
  tokenizer = _load_tokenizer(checkpoint, vocab_size)
  if tokenizer is None:
    return encode_bytes
  return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def load_decoder(checkpoint: str | os.PathLike, vocab_size: int) -> Decode:
  """Returns the inverse of `load_encoder`, which takes the same arguments.

  Special tokens are written out: a generation that ended and went on shows it.
  """
  tokenizer = _load_tokenizer(checkpoint, vocab_size)
  if tokenizer is None:
    return decode_bytes
  return lambda tokens: tokenizer.decode(
    [int(token) for token in tokens], skip_special_tokens=False
  )


def _load_tokenizer(checkpoint, vocab_size):
  """The tokenizer of a folder; None for one of bytes."""
  path = pathlib.Path(checkpoint) / "tokenizer.json"
  if path.is_file():
    try:
      import tokenizers  # Optional: a byte-level model needs none.
    except ImportError as error:
      raise ValueError(
        f"`checkpoint` has a tokenizer ({path.name}), which needs the package"
        " `tokenizers`: install it, for example with `pip install tokenizers`."
      ) from error
    return tokenizers.Tokenizer.from_file(str(path))
  if vocab_size != _BYTE_VOCAB:
    raise ValueError(
      "`checkpoint` must hold tokenizer.json unless its vocabulary is the 256"
      f" bytes: got vocab_size={vocab_size} and no {path}. Copy the model's"
      " tokenizer.json there."
    )
  return None


def encode_bytes(text: str) -> Int32[np.ndarray, " tokens"]:
  """UTF-8 bytes, the vocabulary of the embedded model."""
  return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def decode_bytes(tokens: Iterable[int] | Int[np.ndarray, " tokens"]) -> str:
  """Inverse of `encode_bytes`; bytes that are no UTF-8 become U+FFFD."""
  return bytes(int(token) for token in tokens).decode("utf-8", "replace")


def load_tokens(
  files: Sequence[pathlib.Path],
  encode: Encode,
  max_tokens: int | None = None,
) -> Int32[np.ndarray, " tokens"]:
  """Encodes files one after another, at most `max_tokens` in all."""
  parts, total = [], 0
  for path in files:
    ids = np.asarray(
      encode(path.read_text(encoding="utf-8", errors="replace")), np.int32
    )
    parts.append(ids)
    total += len(ids)
    if max_tokens is not None and total >= max_tokens:
      break
  if not total:
    raise ValueError(
      f"`text` must not be empty: got {len(files)} files without a token."
    )
  tokens = np.concatenate(parts)
  return tokens if max_tokens is None else tokens[:max_tokens]


def random_windows(
  tokens: Int32[np.ndarray, " tokens"],
  rng: np.random.Generator,
  num_windows: int,
  length: int,
) -> Int32[np.ndarray, "{num_windows} {length}"]:
  """Draws windows with replacement."""
  _check_length(tokens, length)
  starts = rng.integers(0, len(tokens) - length + 1, size=num_windows)
  return np.stack([tokens[start : start + length] for start in starts])


def spread_windows(
  tokens: Int32[np.ndarray, " tokens"], num_windows: int, length: int
) -> Int32[np.ndarray, "{num_windows} {length}"]:
  """Takes windows at equal distances, from the first token to the last."""
  _check_length(tokens, length)
  starts = np.linspace(0, len(tokens) - length, num_windows).astype(np.int64)
  return np.stack([tokens[start : start + length] for start in starts])


def _check_length(tokens, length):
  if len(tokens) < length:
    raise ValueError(
      f"`text` must have at least `context` tokens: got {len(tokens)} tokens"
      f" for a context of {length}. Give more text or a smaller context."
    )


def _hash(path) -> int:
  return zlib.crc32("/".join(path.parts[-2:]).encode())
