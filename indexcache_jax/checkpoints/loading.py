# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Loads a Hugging Face folder of glm_moe_dsa or deepseek_v32."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import traverse_util

from indexcache_jax import config as config_lib
from indexcache_jax import schedule as schedule_lib
from indexcache_jax.checkpoints import (
  config_json,
  errors,
  folders,
  fp8,
  matching,
  safetensors_files,
)

CheckpointError = errors.CheckpointError
SparseTransformerConfig = config_lib.SparseTransformerConfig
ReuseSchedule = schedule_lib.ReuseSchedule


def load_config(path: str | os.PathLike) -> SparseTransformerConfig:
  """Reads a checkpoint's config.json alone.

  Args:
    path: folder of the checkpoint.

  Returns:
    The config, with the file's schedule and dtype (float32 if it has none).

  Raises:
    CheckpointError: if the file is absent, no JSON object, or describes a model
      that this package does not compute. The file is taken as untrusted.
  """
  return config_json.config_from_json(
    config_json.read_config(folders.resolve_folder(path))
  )


def load_checkpoint(
  path: str | os.PathLike,
  dtype: Any = jnp.float32,
  *,
  schedule: ReuseSchedule | None = None,
  sharding: Any = None,
  progress: bool = True,
) -> tuple[SparseTransformerConfig, dict[str, Any]]:
  """Loads a published checkpoint, or one of `save_checkpoint`.

  The folder is untrusted: nothing outside it is opened, nothing is unpickled,
  and every size is checked against the files before memory is taken.

  Args:
    path: folder with config.json and *.safetensors in float32, bfloat16 or
      DeepSeek's block-quantised FP8 (DeepSeek-V3, README_WEIGHTS.md), which is
      dequantised. Multi-token-prediction layers are left out.
    dtype: float32 or bfloat16, of the parameters and of `config.dtype`. The
      router's correction bias is float32 always, and the indexer's
      `weights_proj` is never rounded: both are operands of float32 products
      whose near ties decide a selection.
    schedule: which layers keep their indexer; None: as config.json says. The
      indexers of its shared layers are dropped.
    sharding: a `jax.sharding.Sharding` for all parameters, or a nested dict of
      them, one a parameter; each is put straight onto it. None: the default
      device.
    progress: show a bar.

  Returns:
    The config under the schedule, and the nested dict of parameters for
    `SparseTransformer(config).apply({"params": params}, ...)`. Memory: the
    result, one parameter of it on the host on its way to a device, and one
    stored tensor.

  Raises:
    CheckpointError: (a ValueError) for a checkpoint that is unsound, lacks an
      indexer that the schedule needs, or has missing, unexpected or misshapen
      tensors, which are listed together.
    ValueError: for a schedule of another length.
  """
  dtype = _check_dtype(dtype)
  folder = folders.resolve_folder(path)
  raw = config_json.read_config(folder)
  config = config_json.config_from_json(raw)
  own_schedule = config.schedule
  block = config_json.quantization_block(raw) or fp8.DEFAULT_BLOCK
  config = config.replace(
    schedule=schedule or config.schedule, dtype=dtype, param_dtype=dtype
  )
  matches = matching.match_tensors(
    config,
    safetensors_files.find_tensors(folder),
    block=block,
    num_mtp_layers=config_json.num_mtp_layers(raw),
    own_schedule=own_schedule,
  )
  shardings = _shardings(sharding, matches)
  params = {}
  with tqdm.tqdm(
    total=sum(match.nbytes for match in matches),
    desc=f"Loading {folder.name}",
    unit="B",
    unit_scale=True,
    disable=not progress,
  ) as bar:
    for match in matches:
      path_of_param = match.spec.path
      params[path_of_param] = _place(
        _read_param(match, dtype, block, bar), shardings.get(path_of_param)
      )
  return config, traverse_util.unflatten_dict(params)


def _check_dtype(dtype):
  try:
    result = jnp.dtype(dtype)
  except TypeError:
    result = None
  if result not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
      f"`dtype` must be float32 or bfloat16: got {dtype!r}. Cast the parameters"
      " yourself for another one."
    )
  return jnp.float32 if result == jnp.float32 else jnp.bfloat16


def _read_param(match, dtype, block, bar) -> np.ndarray:
  """Returns a whole parameter, in our layout, on the host."""
  spec = match.spec
  target = np.empty(spec.shape, _param_dtype(match, dtype))
  for source in match.sources:
    view = target if source.expert is None else target[source.expert]
    if spec.is_transposed:
      view = view.T
    _read_source(source, view, block)
    bar.update(match.nbytes // len(match.sources))
  return target


def _param_dtype(match, dtype):
  precision = match.spec.precision
  is_wide = any(source.tensor.dtype == "F32" for source in match.sources)
  if precision == "float32" or (precision == "unrounded" and is_wide):
    return jnp.dtype(jnp.float32)
  return jnp.dtype(dtype)


def _read_source(source, view, block):
  """Reads one stored matrix or vector into `view`, of its shape."""
  tensor, scale = source.tensor, source.scale
  if source.matrix is None:
    stored = safetensors_files.read_rows(tensor)
    factors = None if scale is None else safetensors_files.read_rows(scale)
  else:
    stored = safetensors_files.read_rows(
      tensor, source.matrix * tensor.shape[1] + source.first_row, view.shape[0]
    )
    factors = None
    if scale is not None:
      rows = scale.shape[1]
      factors = safetensors_files.read_rows(scale, source.matrix * rows, rows)
  if factors is None:
    # Rounds to nearest even; straight into the transposed place.
    np.copyto(view, stored, casting="unsafe")
  else:
    fp8.dequantize_into(view, stored, factors, block, source.first_row)


def _shardings(sharding, matches) -> dict[tuple[str, ...], Any]:
  """Returns the sharding of each parameter, or nothing."""
  paths = [match.spec.path for match in matches]
  if sharding is None:
    return {}
  if isinstance(sharding, jax.sharding.Sharding):
    return dict.fromkeys(paths, sharding)
  if not isinstance(sharding, Mapping):
    raise ValueError(
      "`sharding` must be a jax.sharding.Sharding or a nested dict of them: got"
      f" a {type(sharding).__name__}."
    )
  flat = traverse_util.flatten_dict(sharding)
  bad = [
    path
    for path in paths
    if not isinstance(flat.get(path), jax.sharding.Sharding)
  ]
  if bad:
    raise ValueError(
      errors.list_faults(
        "`sharding` must have a jax.sharding.Sharding for each parameter: got"
        " none for",
        ("/".join(path) for path in bad),
      )
    )
  return flat


def _place(host: np.ndarray, sharding) -> jax.Array:
  if sharding is None:
    return jax.device_put(host)
  return jax.make_array_from_callback(
    host.shape, sharding, lambda index: host[index]
  )
