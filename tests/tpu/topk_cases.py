# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`top_k` at the rows that DeepSeek-V3.2 and GLM-5 select from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.topk import mosaic_tpu, shapes
from pallas_kernels.topk.mosaic_tpu_kernel import Rounds
from tests.tpu.cases import Case

_SUBSET = ("decode_128k", "decode_1m", "tiny")
# At least the means over normal scores, in a simulation of the search, of the
# slowest of the rows worked on together (8.3 for one, 10.7 for eight, 11.8 for
# 32; of 8K keys 11.2); each pass tries two bounds.
_ROW_1M = Rounds(passes=10, visits=6, slots=3)
_ROW_128K = Rounds(passes=10, slots=3)
_ROWS_8K = Rounds(passes=11, slots=16)
_ROWS_128K = Rounds(passes=12, visits=1, slots=16)
_MANY_ROWS_128K = Rounds(passes=13, visits=1, slots=16)


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
  # Two groups of eight rows, or two long rows, are the least that show the
  # cost of any number; of 64 rows the first copy weighs less.
  for name, rounds, shape in (
    ("8_rows_8k", _ROWS_8K, shapes.Shape(16, 8192, 2048)),
    ("8_rows_128k", _ROWS_128K, shapes.Shape(16, 131072, 2048)),
    ("64_rows_8k", _ROWS_8K, shapes.Shape(64, 8192, 2048)),
    ("64_rows_128k", _MANY_ROWS_128K, shapes.Shape(64, 131072, 2048)),
    ("row_128k", _ROW_128K, shapes.Shape(2, 131072, 2048)),
    ("row_1m", _ROW_1M, shapes.Shape(2, 1048576, 2048)),
  ):
    note = f"{shape.rows} rows; {rounds.passes} passes of the search"
    found.append(_case(name, shape, rounds, note))
  # Of longer rows the profile takes gigabytes.
  found.append(_sort("sort_of_8_rows_8k", shapes.Shape(16, 8192, 2048)))
  return found


def _sort(name, shape):
  """XLA's own way, which has no k of its own: it sorts the rows whole."""
  return dataclasses.replace(
    _case(name, shape),
    function=functools.partial(jax.lax.top_k, k=shape.k),
    cost=True,
    kernels=(),
    temp_bytes=1 << 30,
    cache=None,
    note="lax.top_k, for comparison: in order of score",
  )


def _case(name, shape, rounds=None, note=""):
  is_padded = shape.num_keys % 1024 != 0
  function = functools.partial(
    pallas_kernels.top_k, k=shape.k, implementation="mosaic_tpu"
  )
  if rounds is not None:
    function = functools.partial(mosaic_tpu.top_k, k=shape.k, rounds=rounds)
  scores = jax.ShapeDtypeStruct((shape.rows, shape.num_keys), jnp.float32)
  return Case(
    op="topk",
    name=name,
    function=function,
    arguments=[scores],
    # Nothing as large as the scores, unless they must be padded.
    temp_bytes=(1 << 20) + 4 * shape.rows * (shape.num_keys + 2048)
    if is_padded
    else 1 << 24,
    cache=None if is_padded else scores,
    subset=name in _SUBSET,
    cost=rounds is not None,
    kernels=("top_k",),
    hbm_bytes=4 * shape.rows * (shape.num_keys + shape.k),
    note=note,
  )
