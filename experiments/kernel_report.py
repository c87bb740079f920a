# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables of `bench_kernels`: every figure, and figures beside yardsticks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import common

# A record of `bench_kernels`, or of the file of yardsticks.
Record = Mapping[str, Any]
# By op, shape and mode.
Figures = Mapping[tuple[str, str, str], Record]

_UNITS = {"ms": 1.0, "us": 1e3}


def latest(records: Iterable[Record]) -> dict[tuple[str, str, str], Record]:
  """The last time of each op, shape and mode; runs stand in their order.

  A fault takes no earlier time away: `bench_kernels` shows it.
  """
  return {
    (record["op"], record["shape"], record["mode"]): record
    for record in records
    if "ms" in record
  }


def whole_table(figures: Figures) -> str:
  """A line a workload, both modes."""
  lines = []
  for op, shape in dict.fromkeys((op, shape) for op, shape, _ in figures):
    isolated = figures.get((op, shape, "isolated"))
    sustained = figures.get((op, shape, "sustained"))
    either = sustained or isolated
    lines.append(
      (
        op,
        shape,
        _time(isolated),
        _time(sustained),
        _rate(isolated),
        _rate(sustained),
        _share(isolated, sustained),
        _number(either.get("temp_mib")),
        _number(either["error"]),
        either["commit"],
      )
    )
  head = ("op", "shape", "isolated", "sustained", "rate, isolated")
  head = (*head, "sustained", "shares of the ceiling", "MiB held", "error")
  head = (*head, "commit")
  return common.markdown_table(head, lines)


def yardstick_table(figures: Figures, yardsticks: Sequence[Record]) -> str:
  """A line a yardstick: what was wanted, what is, what the best peer has.

  Args:
    figures: of `latest`.
    yardsticks: `op`, `shape`, `mode`, `unit` ("ms" or "us": less is better;
      "TFLOP/s": more), and of `must`, `aim`, `peer` and its `peer_name` what
      there is.
  """
  lines = []
  for one in yardsticks:
    record = figures.get((one["op"], one["shape"], one["mode"]))
    if record is None:
      wanted = (_number(one.get(key)) for key in ("must", "aim"))
      name = f"{one['op']} {one['shape']}"
      lines.append((name, one["mode"], *wanted, "not measured", "", "", ""))
      continue
    value, gain = _value(record, one["unit"])
    peer = one.get("peer")
    lines.append(
      (
        f"{one['op']} {one['shape']}",
        one["mode"],
        *(_number(one.get(key)) for key in ("must", "aim")),
        f"{_number(value)} {one['unit']}",
        _reached(one, value, gain),
        f"{_number(peer)}, {one['peer_name']}" if peer else "",
        f"{(value / peer) ** gain:.2f}x" if peer else "",
      )
    )
  head = ("work", "mode", "must", "aim", "measured", "reached", "best peer")
  return common.markdown_table((*head, "times as fast"), lines)


def length_table(figures: Figures, pairs: Sequence[Record]) -> str:
  """A line a pair of shapes: the rate of the longer over the shorter's.

  Args:
    figures: of `latest`.
    pairs: `op`, `shape` and `longer`, another shape.
  """
  lines = []
  for pair in pairs:
    first, second = (
      figures.get((pair["op"], pair[key], "sustained"))
      for key in ("shape", "longer")
    )
    if first is None or second is None:
      shapes = (pair["shape"], pair["longer"])
      lines.append((pair["op"], *shapes, "not measured", ""))
      continue
    lines.append(
      (
        pair["op"],
        *(f"{one['shape']}: {_rate(one)}" for one in (first, second)),
        f"{second['rate'] / first['rate']:.2f}",
        _number(second.get("temp_mib")),
      )
    )
  head = ("op", "rate", "rate of a million keys", "ratio", "MiB held")
  return common.markdown_table(head, lines)


def _value(record, unit):
  """A record's figure in a unit, and +1 where more is better, else -1."""
  if unit in _UNITS:
    return record["ms"] * _UNITS[unit], -1
  if record["unit"] != unit:
    raise ValueError(
      f"a yardstick's `unit` must be ms, us or its record's: got {unit!r} for"
      f" {record['op']} {record['shape']}, which has {record['unit']!r}."
    )
  return record["rate"], 1


def _reached(yardstick, value, gain):
  for key in ("aim", "must"):
    if key in yardstick and (value / yardstick[key]) ** gain >= 1:
      return key
  wanted = yardstick.get("must", yardstick.get("aim"))
  if wanted is None:
    return ""
  return f"{(value / wanted) ** gain:.1%}"


def _time(record):
  if record is None:
    return ""
  ms = record["ms"]
  return f"{ms * 1e3:.3g} us" if ms < 0.1 else f"{ms:.3g} ms"


def _rate(record):
  if record is None:
    return ""
  return f"{_number(record['rate'])} {record['unit']}"


def _share(*records):
  return ", ".join(f"{one['share']:.2f}" for one in records if one is not None)


def _number(value):
  if value is None:
    return ""
  return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
