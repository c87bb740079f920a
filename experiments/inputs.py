# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What several scripts read: their shared flags, a model, and text for it."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Int32

import indexcache_jax as ic
from indexcache_jax import sharding, text

CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Hugging Face folder; default: the embedded small model."
)
TEXT = flags.DEFINE_multi_string(
  "text",
  [],
  "Files, folders or globs; default: this Python's standard library, and what"
  " a script adds to it.",
)
CONTEXT = flags.DEFINE_integer(
  "context",
  None,
  "Tokens of a sequence; default: 1024, or four times index_topk if that is"
  " more, up to what the model was made for.",
  lower_bound=2,
)
DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of activations."
)
SEED = flags.DEFINE_integer("seed", 0, "Of whatever is drawn.")
SMOKE = flags.DEFINE_bool("smoke", False, "A tiny run of seconds.")


@dataclasses.dataclass(frozen=True)
class Model:
  """A loaded checkpoint.

  Attributes:
    path: its folder.
    config: under the schedule that was asked for.
    params: nested dict.
    encode: text to token ids.
  """

  path: pathlib.Path
  config: ic.SparseTransformerConfig
  params: dict[str, Any]
  encode: text.Encode

  @property
  def name(self) -> str:
    """What a report calls it: the folder, or that it came with the package."""
    return str(self.path) if CHECKPOINT.value else "the embedded small model"

  @property
  def context(self) -> int:
    """Tokens of a sequence, by the flag or its default."""
    if CONTEXT.value:
      return CONTEXT.value
    wanted = max(1024, 4 * self.config.index_topk)
    return min(wanted, self.config.max_position_embeddings)


def checkpoint_path() -> pathlib.Path:
  """The folder that --checkpoint names."""
  return pathlib.Path(CHECKPOINT.value or ic.embedded_checkpoint())


def load_model(schedule: ic.ReuseSchedule | None = None) -> Model:
  """Loads --checkpoint, over all devices if there are several.

  Args:
    schedule: drops the indexers of its shared layers; None: the checkpoint's.
  """
  path = checkpoint_path()
  config, params = ic.load_checkpoint(
    path,
    dtype=jnp.dtype(DTYPE.value),
    schedule=schedule,
    sharding=_shardings(path, schedule),
  )
  return Model(path, config, params, text.load_encoder(path, config.vocab_size))


def _shardings(path, schedule):
  """Of each parameter; None for one device."""
  if jax.device_count() == 1:
    return None
  config = ic.load_config(path)
  if schedule is not None:
    config = config.replace(schedule=schedule)
  shapes = jax.eval_shape(
    ic.SparseTransformer(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
  )
  return sharding.parameter_shardings(shapes["params"])


def text_files(packages: Sequence[str] = ()) -> list[pathlib.Path]:
  """The files that --text names, by default the standard library's.

  Args:
    packages: installed ones whose source is read beside the library's.
  """
  if TEXT.value:
    return text.expand_files(TEXT.value)
  return text.standard_library_files() + text.package_files(packages)


def split_bytes(
  max_tokens: int | None = None, packages: Sequence[str] = ()
) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
  """Bytes of --text, split into (training, held out) as `split_tokens` does.

  Args:
    max_tokens: of either part at most; None: all.
    packages: see `text_files`.
  """
  return _split(text_files(packages), text.encode_bytes, max_tokens)


def held_out_tokens(model: Model) -> Int32[np.ndarray, " tokens"]:
  """Text that no training or calibration reads, see `split_tokens`."""
  return split_tokens(model)[1]


def split_tokens(
  model: Model,
) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
  """Token ids of --text, split into (calibration, held out).

  By files where both parts get one; a single file is cut in the middle.
  """
  return _split(text_files(), model.encode, None)


def _split(files, encode, max_tokens):
  parts = text.split_files(files)
  if all(parts):
    return tuple(text.load_tokens(part, encode, max_tokens) for part in parts)
  tokens = text.load_tokens(files, encode, max_tokens)
  half = len(tokens) // 2
  return tokens[:half], tokens[half:]


def spread_batches(
  tokens: Int32[np.ndarray, " tokens"],
  num_tokens: int,
  context: int,
  batch_size: int,
) -> Int32[np.ndarray, "M B T"]:
  """Windows at equal distances: about `num_tokens`, in whole batches."""
  num_windows = max(1, round(num_tokens / context))
  batch_size = min(batch_size, num_windows)
  num_batches = math.ceil(num_windows / batch_size)
  windows = text.spread_windows(tokens, num_batches * batch_size, context)
  return windows.reshape(num_batches, batch_size, context)
