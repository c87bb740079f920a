# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Untrusted folders: files strictly within them, and strict JSON."""

import json
import os
import pathlib
import re
import stat
from typing import Any, BinaryIO

from indexcache_jax.checkpoints import errors

CheckpointError = errors.CheckpointError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", re.ASCII)


def resolve_folder(path: str | os.PathLike) -> pathlib.Path:
  """Returns the folder of a checkpoint, its own links followed."""
  folder = pathlib.Path(path)
  if folder.is_dir():
    return folder.resolve()
  message = f"`path` must be a checkpoint's folder: got {os.fspath(path)!r}"
  if folder.exists():
    raise CheckpointError(f"{message}, which is a file.")
  message += ", which does not exist."
  asides = sorted(folder.parent.glob(f".{folder.name}.*.old"))
  if asides:
    message += (
      f" A save was interrupted while it replaced this folder; {asides[0]} is"
      " what it held: rename it back."
    )
  else:
    message += (
      " For a model of the Hugging Face hub, `hf download REPOSITORY"
      " --local-dir FOLDER` first."
    )
  raise CheckpointError(message)


def resolve_file(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the real path of a file, which is surely within its folder.

  Args:
    folder: from `resolve_folder`.
    name: of the file, possibly named by the checkpoint itself.

  Raises:
    CheckpointError: for a name with a directory in it, a link that leaves the
      folder, a missing file, or anything but a regular file.
  """
  if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
    raise CheckpointError(
      "a checkpoint's files must have plain names within its folder: got"
      f" {name!r}. Paths such as '../x' and '/x' are never followed."
    )
  try:
    real = (folder / name).resolve(strict=True)
    mode = real.stat().st_mode
  except (OSError, RuntimeError) as error:
    raise CheckpointError(
      f"the checkpoint must have the file {name!r}: {folder / name} cannot be"
      f" opened ({error})."
    ) from error
  if not real.is_relative_to(folder):
    raise CheckpointError(
      "a checkpoint's files must stay within its folder: got the link"
      f" {folder / name} to {real}. If you trust it, as in a Hugging Face"
      f" cache, copy the files first: cp -rL {folder} NEW_FOLDER."
    )
  if not stat.S_ISREG(mode):
    raise CheckpointError(
      f"a checkpoint's files must be regular files: {folder / name} is not."
    )
  return real


def open_file(path: pathlib.Path) -> BinaryIO:
  """Opens what `resolve_file` returned; a link put there since is refused."""
  flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)
  return os.fdopen(os.open(path, flags), "rb", buffering=0)


def read_json(
  folder: pathlib.Path, name: str, max_bytes: int
) -> dict[str, Any]:
  """Returns the JSON object in a file of at most `max_bytes`."""
  path = resolve_file(folder, name)
  with open_file(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
      raise CheckpointError(
        f"{name} must have at most {max_bytes} bytes: got {size} in {path}."
      )
    return parse_json(file.read(size), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
  """Returns the JSON object that `text` is, and nothing but that.

  Args:
    text: UTF-8.
    where: what to call it in an error.

  Raises:
    CheckpointError: for text that is not JSON, not an object, nested beyond
      the parser's depth, or has a key twice, at any level.
  """
  try:
    value = json.loads(
      text.decode("utf-8"),
      object_pairs_hook=_unique_pairs,
      parse_constant=_refuse_constant,
    )
  except CheckpointError as error:
    raise CheckpointError(f"{where}: {error}") from error
  except (ValueError, RecursionError) as error:
    raise CheckpointError(f"{where} must be JSON: {error}.") from error
  if not isinstance(value, dict):
    raise CheckpointError(
      f"{where} must be a JSON object: got a {type(value).__name__}."
    )
  return value


def _unique_pairs(pairs):
  result = {}
  for key, value in pairs:
    if key in result:
      raise CheckpointError(f"a key must not be given twice: got {key!r}.")
    result[key] = value
  return result


def _refuse_constant(name):
  raise CheckpointError(f"numbers must be finite: got {name}.")
