# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Matches what a model needs with what a checkpoint has, before any reading.

All faults are listed in one error: a user should fix them in one go.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from absl import logging

from indexcache_jax import config as config_lib
from indexcache_jax import schedule as schedule_lib
from indexcache_jax.checkpoints import errors, fp8, layout, safetensors_files

CheckpointError = errors.CheckpointError
TensorInfo = safetensors_files.TensorInfo

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)", re.ASCII)
# Parts that only a multi-token-prediction layer has (DeepSeek-V3, section 2.2).
_MTP_PARTS = ("eh_proj.", "enorm.", "hnorm.", "shared_head.", "embed_tokens.")


class Source(NamedTuple):
  """Where one matrix, or one whole tensor, of a parameter is stored.

  Attributes:
    tensor: its stored tensor.
    scale: the factors of an FP8 tensor, else None.
    expert: place in the parameter's first dimension; None: the whole.
    first_row: first of the rows, within its matrix of the stored tensor.
    matrix: which matrix of a stack of experts; None: `tensor` is no stack.
  """

  tensor: TensorInfo
  scale: TensorInfo | None = None
  expert: int | None = None
  first_row: int = 0
  matrix: int | None = None


class Match(NamedTuple):
  """One parameter and all that it is read from."""

  spec: layout.ParamSpec
  sources: list[Source]

  @property
  def nbytes(self) -> int:
    """Bytes to read, without FP8 factors."""
    spec, tensor = self.spec, self.sources[0].tensor
    if self.sources[0].matrix is None:
      return sum(source.tensor.nbytes for source in self.sources)
    rows = spec.shape[-1]
    return (
      len(self.sources)
      * rows
      * (tensor.nbytes // (tensor.shape[0] * tensor.shape[1]))
    )


def match_tensors(
  config: config_lib.SparseTransformerConfig,
  tensors: Mapping[str, TensorInfo],
  *,
  block: tuple[int, int],
  num_mtp_layers: int,
  own_schedule: schedule_lib.ReuseSchedule,
) -> list[Match]:
  """Returns the sources of every parameter.

  Args:
    config: of the model, with the schedule that is wanted.
    tensors: all of the checkpoint.
    block: rows and columns of an FP8 block.
    num_mtp_layers: that config.json announces.
    own_schedule: of config.json.

  Raises:
    CheckpointError: lists layers whose indexers are wanted and absent, then
      missing, unexpected and misshapen tensors, and wrong dtypes.
  """
  left_out = _mtp_names(config, tensors, num_mtp_layers)
  left_out |= _dropped_indexers(config, tensors)
  absent = _absent_indexers(config, tensors)
  never_there = {
    key for key, layer in absent.items() if not own_schedule.is_full(layer)
  }
  found = _Findings(tensors, block)
  matches = []
  for spec in layout.param_specs(config):
    if layout.INDEXER in spec.path and spec.path[0] in never_there:
      continue
    matches.append(found.match(spec))
  unexpected = tensors.keys() - found.used - left_out
  text = [
    _describe_absent(absent, config.schedule, own_schedule),
    errors.list_faults("missing tensors", found.missing),
    errors.list_faults(
      "unexpected tensors",
      (f"{name!r}: {_describe(tensors[name])}" for name in sorted(unexpected)),
    ),
    errors.list_faults("misshapen tensors", found.misshapen),
    errors.list_faults("tensors of a wrong dtype", found.wrong_dtypes),
  ]
  if any(text):
    raise CheckpointError(
      "the checkpoint must have the tensors that its config.json describes:\n"
      + "\n".join(filter(None, text))
    )
  return matches


class _Findings:
  """Collects sources and faults, parameter by parameter."""

  def __init__(self, tensors, block):
    self._tensors, self._block = tensors, block
    self.used: set[str] = set()
    self.missing: list[str] = []
    self.misshapen: list[str] = []
    self.wrong_dtypes: list[str] = []

  def match(self, spec):
    """Returns a parameter's sources, noting what is wrong with them."""
    fused = spec.fused
    if fused is None or fused.name not in self._tensors:
      sources = []
      for place, name in enumerate(spec.names):
        tensor, scale = self._tensor(name, spec.stored_shape)
        expert = place if spec.is_stacked else None
        sources.append(Source(tensor, scale, expert))
      return Match(spec, sources)
    tensor, scale = self._tensor(fused.name, fused.shape)
    return Match(
      spec,
      [
        Source(tensor, scale, expert, fused.first_row, expert)
        for expert in range(spec.shape[0])
      ],
    )

  def _tensor(self, name, shape):
    info = self._tensors.get(name)
    is_new = name not in self.used  # A fused tensor is asked for twice.
    self.used.add(name)
    if info is None:
      self.missing.append(f"{name!r}: expected shape {shape}")
      return None, None
    if info.shape != shape and is_new:
      self.misshapen.append(
        f"{name!r}: expected shape {shape}, found {info.shape}"
      )
    if info.dtype not in safetensors_files.STORED_DTYPES and is_new:
      self.wrong_dtypes.append(
        f"{name!r}: expected one of"
        f" {sorted(safetensors_files.STORED_DTYPES)}, found {info.dtype}"
      )
    if info.dtype != "F8_E4M3":
      return info, None
    return info, self._scale(name, info.shape, is_new)

  def _scale(self, name, shape, is_new):
    name += fp8.SCALE_SUFFIX
    if len(shape) < 2:
      self.wrong_dtypes.append(f"{name!r}: only matrices may be F8_E4M3")
      return None
    expected = fp8.scale_shape(shape, self._block)
    self.used.add(name)
    scale = self._tensors.get(name)
    if scale is None:
      if is_new:
        self.missing.append(f"{name!r}: expected shape {expected}, F32")
      return None
    if scale.shape != expected and is_new:
      self.misshapen.append(
        f"{name!r}: expected shape {expected}, found {scale.shape}"
      )
    if scale.dtype not in ("F32", "BF16") and is_new:
      self.wrong_dtypes.append(
        f"{name!r}: expected F32 or BF16, found {scale.dtype}"
      )
    return scale


def _describe(info: TensorInfo) -> str:
  return f"found shape {info.shape}, {info.dtype}"


def _mtp_names(config, tensors: Iterable[str], num_mtp_layers: int) -> set[str]:
  """Names of the layers beyond the model's that predict further tokens."""
  beyond: dict[int, list[str]] = {}
  is_mtp: set[int] = set()
  first = config.num_hidden_layers
  for name in tensors:
    parts = _LAYER.fullmatch(name)
    if parts is None or (layer := int(parts[1])) < first:
      continue
    beyond.setdefault(layer, []).append(name)
    if layer < first + num_mtp_layers or parts[2].startswith(_MTP_PARTS):
      is_mtp.add(layer)
  names = {name for layer in is_mtp for name in beyond[layer]}
  if names:
    logging.info(
      "Left out multi-token-prediction layers %s (%d tensors): the model does"
      " not use them.",
      sorted(is_mtp),
      len(names),
    )
  return names


def _dropped_indexers(config, tensors) -> set[str]:
  """Names of the indexers of shared layers."""
  dropped, layers = set(), []
  for layer in range(config.num_hidden_layers):
    if config.schedule.is_full(layer):
      continue
    names = _indexer_names(config, layer)
    names |= {name + fp8.SCALE_SUFFIX for name in names}
    names &= tensors.keys()
    if names:
      layers.append(layer)
      dropped |= names
  if layers:
    logging.info(
      "Dropped the indexers of layers %s, which share a selection under the"
      " schedule %s.",
      layers,
      config.schedule.pattern,
    )
  return dropped


def _absent_indexers(config, tensors) -> dict[str, int]:
  """Full layers without any tensor of an indexer, by their key."""
  return {
    f"layers_{layer}": layer
    for layer in config.schedule.full_layers
    if not _indexer_names(config, layer) & tensors.keys()
  }


def _indexer_names(config, layer) -> set[str]:
  return {
    name for spec in layout.indexer_specs(config, layer) for name in spec.names
  }


def _describe_absent(absent, schedule, own_schedule) -> str:
  if not absent:
    return ""
  layers = ", ".join(map(str, absent.values()))
  return (
    f"indexers of layers {layers}: full under the schedule"
    f" {schedule.pattern!r}, but the checkpoint has no indexer there; its own"
    f" schedule is {own_schedule.pattern!r}. Choose a `schedule` that shares"
    " these layers, or load the full checkpoint."
  )
