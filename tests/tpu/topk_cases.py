# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`top_k` at the rows that DeepSeek-V3.2 and GLM-5 select from."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.topk import mosaic_tpu, shapes
from tests.tpu.cases import Case

_SUBSET = ("decode_128k", "decode_1m", "tiny")
# The search ends when k keys are at or above its bound: after 22 to 28 passes
# for a row of random scores at 128K keys, after 32 at the latest.
_PASSES = 24


def cases() -> list[Case]:
  """The table of shapes, and 8K keys and odd ones."""
  table = {
    **shapes.SHAPES,
    "prefill_8k": shapes.Shape(4096, 8192, 2048),
    "decode_8k": shapes.Shape(64, 8192, 2048),
    "decode_512k": shapes.Shape(16, 524288, 2048),
    "odd": shapes.Shape(13, 5003, 700),
  }
  found = [_case(name, shape) for name, shape in table.items()]
  # Two groups of eight rows, or two long rows, show the cost of any number.
  for name, shape in (
    ("8_rows_8k", shapes.Shape(16, 8192, 2048)),
    ("8_rows_128k", shapes.Shape(16, 131072, 2048)),
    ("row_1m", shapes.Shape(2, 1048576, 2048)),
  ):
    note = f"two steps; {_PASSES} passes of the search"
    found.append(_case(name, shape, _PASSES, note))
  return found


def _case(name, shape, passes=None, note=""):
  is_padded = shape.num_keys % 1024 != 0
  function = functools.partial(
    pallas_kernels.top_k, k=shape.k, implementation="mosaic_tpu"
  )
  if passes is not None:
    function = functools.partial(mosaic_tpu.top_k, k=shape.k, passes=passes)
  return Case(
    op="topk",
    name=name,
    function=function,
    arguments=[jax.ShapeDtypeStruct((shape.rows, shape.num_keys), jnp.float32)],
    # Nothing as large as the scores, unless they must be padded.
    temp_bytes=(1 << 20) + 4 * shape.rows * (shape.num_keys + 2048)
    if is_padded
    else 1 << 24,
    cache=None if is_padded else 0,
    subset=name in _SUBSET,
    cost=passes is not None,
    kernels=("top_k",),
    hbm_bytes=4 * shape.rows * (shape.num_keys + shape.k),
    note=note,
  )
