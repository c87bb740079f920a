# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints for the tests, and a writer that shares no code with ours.

Parameters come from the model's own shapes, so that they check our table of
names against it; they are random, which `toy.full_params` needs a compilation
for.
"""

import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import indexcache_jax as ic
from indexcache_jax import checkpoints
from tests.indexcache import toy

DTYPE_NAMES = {
  "float32": "F32",
  "bfloat16": "BF16",
  "float8_e4m3fn": "F8_E4M3",
  "float16": "F16",
  "int32": "I32",
}


def temporary_folder(case):
  """Returns a folder that goes with the test; absl's needs parsed flags."""
  folder = tempfile.TemporaryDirectory()
  case.addCleanup(folder.cleanup)
  return pathlib.Path(folder.name)


@functools.lru_cache
def _shapes(config):
  init = ic.SparseTransformer(config).init
  tree = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  return traverse_util.flatten_dict(tree["params"])


def random_params(config, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return traverse_util.unflatten_dict(
    {
      path: jnp.asarray(
        rng.normal(size=leaf.shape),
        jnp.float32 if path[-1] == "e_score_correction_bias" else dtype,
      )
      for path, leaf in _shapes(config).items()
    }
  )


def save(folder, pattern="FFFF", *, config=None, **kwargs):
  """Writes a toy checkpoint; returns its config and parameters."""
  config = toy.config(pattern) if config is None else config
  params = random_params(config)
  checkpoints.save_checkpoint(folder, config, params, **kwargs)
  return config, params


def load(folder, *args, **kwargs):
  return checkpoints.load_checkpoint(folder, *args, progress=False, **kwargs)


def header_bytes(header):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text


def write_tensors(path, tensors):
  """Writes a safetensors file by the letter of the format."""
  header, data = {}, b""
  for name, value in tensors.items():
    raw = np.ascontiguousarray(value).tobytes()
    header[name] = {
      "dtype": DTYPE_NAMES[value.dtype.name],
      "shape": list(value.shape),
      "data_offsets": [len(data), len(data) + len(raw)],
    }
    data += raw
  path.write_bytes(header_bytes(header) + data)


def read_tensors(path):
  """Reads one back; the reverse of `write_tensors`."""
  raw = path.read_bytes()
  start = 8 + int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8:start])
  header.pop("__metadata__", None)
  names = {value: key for key, value in DTYPE_NAMES.items()}
  return {
    name: np.frombuffer(
      raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
      jnp.dtype(names[entry["dtype"]]),
    ).reshape(entry["shape"])
    for name, entry in header.items()
  }


def edit_tensors(folder, edit):
  """Rewrites the one shard of a folder after `edit(tensors)`."""
  path = folder / "model.safetensors"
  tensors = read_tensors(path)
  edit(tensors)
  write_tensors(path, tensors)


def edit_config(folder, **changes):
  """Changes fields of config.json; ... removes one."""
  path = folder / "config.json"
  raw = json.loads(path.read_text()) | changes
  raw = {key: value for key, value in raw.items() if value is not ...}
  path.write_text(json.dumps(raw))


def assert_bits_equal(case, expected, actual):
  expected = traverse_util.flatten_dict(expected)
  actual = traverse_util.flatten_dict(actual)
  case.assertEqual(sorted(expected), sorted(actual))
  for path, value in expected.items():
    with case.subTest("/".join(path)):
      case.assertEqual(value.dtype, actual[path].dtype)
      case.assertEqual(
        np.asarray(value).tobytes(), np.asarray(actual[path]).tobytes()
      )
