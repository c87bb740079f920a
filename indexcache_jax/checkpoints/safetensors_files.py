# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading safetensors shards that nobody vouches for.

A file is eight bytes of header length, a JSON header, and the tensors' bytes
without gaps (https://github.com/huggingface/safetensors). Everything that the
header says is checked against the file's size before anything is allocated.
"""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from indexcache_jax.checkpoints import errors, folders

CheckpointError = errors.CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The format's own limit on a header; an index of a million tensors has less.
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 8
_ITEM_BYTES = {
  **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
  **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
  **dict.fromkeys(("I32", "U32", "F32"), 4),
  **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
# What parameters may be stored as; the rest is known by size alone.
STORED_DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


class TensorInfo(NamedTuple):
  """A stored tensor, not read yet.

  Attributes:
    path: real path of its shard.
    dtype: the format's name of its dtype.
    shape: its dimensions.
    offset: of its first byte in the file.
    nbytes: its size, which is that of the shape.
  """

  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int
  nbytes: int


def find_tensors(folder: pathlib.Path) -> dict[str, TensorInfo]:
  """Returns all tensors of a checkpoint; reads headers only.

  The shards are those of the index, or every `*.safetensors` without one.
  Pickled weights (`*.bin`, `*.pt`) are never opened.

  Raises:
    CheckpointError: for a shard or an index that is not sound, or two shards
      with one tensor.
  """
  names = {
    entry.name for entry in folder.iterdir() if entry.suffix == ".safetensors"
  }
  weight_map = None
  if os.path.lexists(folder / INDEX_NAME):
    weight_map = _read_index(folder)
    if SINGLE_NAME in names - set(weight_map.values()):
      raise CheckpointError(
        f"a checkpoint must have {SINGLE_NAME} or {INDEX_NAME}: {folder} has"
        " both, and the index does not name the file. Remove the stale one."
      )
    names = set(weight_map.values())
  if not names:
    raise CheckpointError(
      f"`path` must hold *.safetensors: got none in {folder}. Pickled weights"
      " are never read; convert them with safetensors."
    )
  tensors = {}
  for name in sorted(names):
    for key, info in read_header(folders.resolve_file(folder, name)).items():
      if key in tensors:
        raise CheckpointError(
          f"a tensor must be in one shard: got {key!r} in"
          f" {tensors[key].path.name} and {name}."
        )
      tensors[key] = info
  if weight_map is not None:
    _check_index(weight_map, tensors, folder)
  return tensors


def read_header(path: pathlib.Path) -> dict[str, TensorInfo]:
  """Returns the tensors of one shard.

  Raises:
    CheckpointError: unless the header is sound and describes exactly the
      bytes that the file has.
  """
  with folders.open_file(path) as file:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
      raise CheckpointError(
        f"{path} must begin with the length of its header, at most"
        f" {_MAX_HEADER_BYTES} and within the file: got"
        f" {length if len(prefix) == 8 else prefix!r} in a file of {size}"
        " bytes. It is truncated or no safetensors file."
      )
    header = folders.parse_json(file.read(length), f"the header of {path}")
  start = 8 + length
  header.pop("__metadata__", None)
  tensors = {
    name: _parse_entry(path, name, entry, start)
    for name, entry in header.items()
  }
  _check_cover(path, tensors, start, size)
  return tensors


def read_rows(
  info: TensorInfo, first_row: int = 0, num_rows: int | None = None
) -> np.ndarray:
  """Reads consecutive rows of a tensor of two or more dimensions, or all.

  Args:
    info: from `find_tensors`, its dtype among `STORED_DTYPES`.
    first_row: counted over all dimensions but the last.
    num_rows: None: the whole tensor, of any shape.

  Returns:
    A fresh array, the only memory taken: [num_rows, last dimension], or the
    tensor.
  """
  dtype = STORED_DTYPES[info.dtype]
  shape, offset = info.shape, info.offset
  if num_rows is not None:
    shape = (num_rows, info.shape[-1])
    offset += first_row * info.shape[-1] * dtype.itemsize
  result = np.empty(shape, dtype)
  buffer = memoryview(result.reshape(-1).view(np.uint8))
  with folders.open_file(info.path) as file:
    file.seek(offset)
    done = 0
    while done < len(buffer):
      count = file.readinto(buffer[done:])
      if not count:
        raise CheckpointError(
          f"{info.path} must not change while it is read: got {done} of"
          f" {len(buffer)} bytes at offset {offset}."
        )
      done += count
  return result


def _parse_entry(path, name, entry, start):
  fault = f"tensor {name!r} in {path}"
  if not isinstance(entry, dict) or set(entry) != {
    "dtype",
    "shape",
    "data_offsets",
  }:
    raise CheckpointError(
      f"{fault} must have dtype, shape and data_offsets: got {entry!r:.200}."
    )
  dtype, shape = entry["dtype"], entry["shape"]
  offsets = entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
    raise CheckpointError(
      f"{fault} must have a dtype of {sorted(_ITEM_BYTES)}: got {dtype!r:.80}."
    )
  if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
    raise CheckpointError(
      f"{fault} must have a shape of at most {_MAX_DIMENSIONS} sizes of 0 or"
      f" more: got {shape!r:.200}."
    )
  if not _are_counts(offsets) or len(offsets) != 2:
    raise CheckpointError(
      f"{fault} must have two data_offsets of 0 or more: got {offsets!r:.200}."
    )
  nbytes = offsets[1] - offsets[0]
  expected = math.prod(shape) * _ITEM_BYTES[dtype]
  if nbytes != expected:
    raise CheckpointError(
      f"{fault} must have as many bytes as its shape: got data_offsets"
      f" {offsets} for {dtype} of shape {shape}, {expected} bytes."
    )
  return TensorInfo(path, dtype, tuple(shape), start + offsets[0], nbytes)


def _are_counts(values):
  return isinstance(values, list) and all(
    type(value) is int and 0 <= value < 2**63 for value in values
  )


def _check_cover(path, tensors, start, size):
  """Checks that the tensors lie side by side and fill the file."""
  end = start
  for name, info in sorted(tensors.items(), key=lambda item: item[1][3:]):
    if info.offset != end:
      kind = "overlap" if info.offset < end else "leave a gap"
      raise CheckpointError(
        f"tensors in {path} must lie side by side: {name!r} begins at byte"
        f" {info.offset - start} of the data, the one before ends at"
        f" {end - start}; they {kind}."
      )
    end += info.nbytes
  if end != size:
    state = "truncated" if size < end else "followed by other bytes"
    raise CheckpointError(
      f"{path} must have the {end} bytes that its header describes: got {size};"
      f" it is {state}."
    )


def _read_index(folder) -> dict[str, str]:
  index = folders.read_json(folder, INDEX_NAME, _MAX_HEADER_BYTES)
  weight_map = index.get("weight_map")
  if (
    not isinstance(weight_map, dict)
    or not weight_map
    or not all(isinstance(name, str) for name in weight_map.values())
  ):
    raise CheckpointError(
      f"`weight_map` in {INDEX_NAME} must name a shard for each tensor: got"
      f" {weight_map!r:.200}."
    )
  for tensor, name in weight_map.items():
    if not name.endswith(".safetensors"):
      raise CheckpointError(
        f"`weight_map` in {INDEX_NAME} must name *.safetensors files: got"
        f" {name!r:.200} for {tensor!r:.200}. No other kind is ever opened."
      )
  return weight_map


def _check_index(
  weight_map: Mapping[str, str],
  tensors: Mapping[str, TensorInfo],
  folder: pathlib.Path,
):
  """Checks that the index and the shards tell of the same tensors."""
  faults = []
  for name in sorted(weight_map.keys() | tensors.keys()):
    told = weight_map.get(name, "nowhere")
    found = tensors[name].path if name in tensors else None
    if found is None:
      faults.append(f"{name!r}: {told} by the index, in no shard")
    elif told == "nowhere" or (folder / told).resolve() != found:
      faults.append(f"{name!r}: {told} by the index, found in {found.name}")
  if faults:
    raise CheckpointError(
      errors.list_faults(
        f"{folder / INDEX_NAME} must agree with its shards on every tensor",
        faults,
      )
    )
