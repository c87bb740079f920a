# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint in the published format, whole or not at all."""

import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from indexcache_jax import config as config_lib
from indexcache_jax.checkpoints import (
  config_json,
  config_writing,
  errors,
  layout,
  safetensors_files,
)

CheckpointError = errors.CheckpointError
SparseTransformerConfig = config_lib.SparseTransformerConfig

_FORMAT_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_OURS = (config_json.CONFIG_NAME, safetensors_files.INDEX_NAME)


class _Tensor(NamedTuple):
  """One tensor to write: its name, and where it comes from."""

  name: str
  spec: layout.ParamSpec
  expert: int | None
  dtype: np.dtype

  @property
  def nbytes(self):
    """Size in the file."""
    return int(np.prod(self.spec.stored_shape)) * self.dtype.itemsize


def save_checkpoint(
  path: str | os.PathLike,
  config: SparseTransformerConfig,
  params: Mapping[str, Any],
  *,
  dtype: Any = None,
  max_shard_bytes: int = 5 * 10**9,
  overwrite: bool = False,
) -> None:
  """Writes config.json and safetensors as Hugging Face publishes them.

  `load_checkpoint` reads back the same bits, transformers' GlmMoeDsaForCausalLM
  and DeepseekV32ForCausalLM load the folder. It is written under a temporary
  name beside `path` and renamed when it is complete, so an interruption leaves
  `path` as it was.

  Args:
    path: folder to make; its parent is made too.
    config: of the model; `config.schedule` decides which indexers are written.
    params: nested dict, float32 or bfloat16 arrays.
    dtype: of the written tensors; None: as they are. The router's correction
      bias is written in float32 always, and the indexer's `weights_proj` is
      never rounded, see `load_checkpoint`.
    max_shard_bytes: of the tensors in one file; a larger tensor has one alone.
    overwrite: replace a checkpoint that is there. Other files in its folder,
      such as a tokenizer, are kept.

  Raises:
    CheckpointError: (a ValueError) for parameters that do not fit the config,
      listed together, a config that the format cannot say, and a folder that is
      not empty and not to be overwritten, or is no checkpoint.

  Memory: one parameter on the host beside `params`.
  """
  target = pathlib.Path(os.path.realpath(path))
  _check_target(target, overwrite)
  if dtype is not None and jnp.dtype(dtype).name not in _FORMAT_NAMES:
    raise CheckpointError(
      f"`dtype` must be float32, bfloat16 or None: got {dtype!r}."
    )
  if max_shard_bytes < 1:
    raise CheckpointError(
      f"`max_shard_bytes` must be positive: got {max_shard_bytes}."
    )
  flat = traverse_util.flatten_dict(dict(params))
  tensors = _list_tensors(config, flat, dtype)
  config_object = config_writing.config_to_json(config, (tensors[0].dtype).name)
  target.parent.mkdir(parents=True, exist_ok=True)
  tag = uuid.uuid4().hex[:8]
  partial = target.with_name(f".{target.name}.{tag}.partial")
  partial.mkdir()
  try:
    _write_shards(partial, tensors, flat, max_shard_bytes)
    _write_json(partial / config_json.CONFIG_NAME, config_object)
    _sync(partial)
    _check_target(target, overwrite)
    _swap(partial, target, target.with_name(f".{target.name}.{tag}.old"))
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  _sync(target.parent)


def _check_target(target: pathlib.Path, overwrite: bool):
  if not os.path.lexists(target):
    return
  if not target.is_dir():
    raise CheckpointError(f"`path` must be a folder: {target} is a file.")
  names = {entry.name for entry in target.iterdir()}
  if not names:
    return
  if not overwrite:
    raise CheckpointError(
      f"`path` must be new or empty: {target} holds {len(names)} files. Give"
      " overwrite=True to replace the checkpoint in it."
    )
  if config_json.CONFIG_NAME not in names:
    raise CheckpointError(
      f"`path` must be a checkpoint to be overwritten: {target} has no"
      f" {config_json.CONFIG_NAME}. Give a new folder."
    )


def _list_tensors(config, flat, dtype) -> list[_Tensor]:
  """Returns what to write; checks the parameters against the config."""
  flat = dict(flat)
  tensors, missing, bad = [], [], []
  for spec in layout.param_specs(config):
    name, param = "/".join(spec.path), flat.pop(spec.path, None)
    if param is None:
      missing.append(f"{name}: expected shape {spec.shape}")
      continue
    if param.shape != spec.shape:
      bad.append(f"{name}: expected shape {spec.shape}, found {param.shape}")
    if jnp.dtype(param.dtype).name not in _FORMAT_NAMES:
      bad.append(f"{name}: expected float32 or bfloat16, found {param.dtype}")
    if not getattr(param, "is_fully_addressable", True):
      bad.append(f"{name}: expected on this process, found on several")
    stored = _stored_dtype(spec, param, dtype)
    for place, tensor_name in enumerate(spec.names):
      expert = place if spec.is_stacked else None
      tensors.append(_Tensor(tensor_name, spec, expert, stored))
  unexpected = _without_shared_indexers(config, flat)
  text = [
    errors.list_faults("missing parameters", missing),
    errors.list_faults(
      "unexpected parameters", ("/".join(path) for path in unexpected)
    ),
    errors.list_faults("misshapen or wrong parameters", bad),
  ]
  if any(text):
    raise CheckpointError(
      "`params` must have the parameters that `config` describes:\n"
      + "\n".join(filter(None, text))
    )
  return tensors


def _stored_dtype(spec, param, dtype):
  own = jnp.dtype(param.dtype)
  asked = own if dtype is None else jnp.dtype(dtype)
  is_kept = spec.precision == "unrounded" and own == jnp.float32
  if spec.precision == "float32" or is_kept:
    return jnp.dtype(jnp.float32)
  return asked


def _without_shared_indexers(config, paths) -> list[tuple[str, ...]]:
  """Returns the paths left over but for the indexers of shared layers."""
  shared = {
    spec.path
    for layer in range(config.num_hidden_layers)
    if not config.schedule.is_full(layer)
    for spec in layout.indexer_specs(config, layer)
  }
  if shared & set(paths):
    logging.info(
      "Indexers of the shared layers under %s are not written.",
      config.schedule.pattern,
    )
  return [path for path in paths if path not in shared]


def _write_shards(folder, tensors, flat, max_shard_bytes):
  shards = list(_split(tensors, max_shard_bytes))
  if len(shards) == 1:
    _write_shard(folder / safetensors_files.SINGLE_NAME, shards[0], flat)
    return
  weight_map = {}
  for number, shard in enumerate(shards, start=1):
    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    _write_shard(folder / name, shard, flat)
    weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
  total = sum(tensor.nbytes for tensor in tensors)
  _write_json(
    folder / safetensors_files.INDEX_NAME,
    {"metadata": {"total_size": total}, "weight_map": weight_map},
  )


def _split(tensors, max_shard_bytes) -> Iterator[list[_Tensor]]:
  shard, size = [], 0
  for tensor in tensors:
    if shard and size + tensor.nbytes > max_shard_bytes:
      yield shard
      shard, size = [], 0
    shard.append(tensor)
    size += tensor.nbytes
  yield shard


def _write_shard(path, shard, flat):
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for tensor in shard:
    header[tensor.name] = {
      "dtype": _FORMAT_NAMES[tensor.dtype.name],
      "shape": list(tensor.spec.stored_shape),
      "data_offsets": [end, end + tensor.nbytes],
    }
    end += tensor.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # The format aligns the data to 8 bytes.
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in shard:
      file.write(_to_bytes(flat[tensor.spec.path], tensor))
    file.flush()
    os.fsync(file.fileno())


def _to_bytes(param, tensor: _Tensor) -> memoryview:
  """Returns a tensor's bytes in the file's layout."""
  if tensor.expert is not None:
    param = param[tensor.expert]
  elif isinstance(param, jax.Array):
    # An array keeps the host copy that it was read through, and so would the
    # whole model; a copy of the array takes it along when it is dropped.
    param = param.copy()
  host = np.asarray(param)
  if tensor.spec.is_transposed:
    host = host.T
  host = np.ascontiguousarray(host.astype(tensor.dtype, copy=False))
  return memoryview(host.reshape(-1).view(np.uint8))


def _write_json(path, value):
  with open(path, "w", encoding="utf-8") as file:
    json.dump(value, file, indent=2)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())


def _swap(partial, target, aside):
  """Renames the complete folder into place; the old one is deleted last."""
  if not os.path.lexists(target):
    os.rename(partial, target)
    return
  try:
    os.rename(target, aside)
    os.rename(partial, target)
  except BaseException:
    if aside.exists() and not target.exists():
      os.rename(aside, target)
    raise
  for entry in aside.iterdir():
    if entry.name not in _OURS and entry.suffix != ".safetensors":
      os.rename(entry, target / entry.name)
  shutil.rmtree(aside)


def _sync(folder):
  """Makes renames in a folder survive a power cut, where the system can."""
  if not hasattr(os, "O_DIRECTORY"):
    return
  descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
