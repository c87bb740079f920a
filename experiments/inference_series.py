# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `bench_inference` times: a schedule, and a dtype of the index keys."""

import dataclasses

import jax.numpy as jnp

import indexcache_jax as ic

# Appendix B of the paper.
PAPER_PATTERNS = {
  "1/2": "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF",
  "1/4": "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS",
  "1/8": "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS",
}


@dataclasses.dataclass(frozen=True)
class Series:
  """A schedule and a dtype of the index keys.

  Attributes:
    name: of the schedule.
    key_dtype: of the index keys, by name.
    config: of the model under both.
  """

  name: str
  key_dtype: str
  config: ic.SparseTransformerConfig

  @property
  def labels(self) -> dict:
    """What its records have in common."""
    return {
      "schedule": self.name,
      "num_full": self.config.schedule.num_full,
      "index_keys": self.key_dtype,
    }


def series(
  config: ic.SparseTransformerConfig, name: str, key_dtype: str
) -> Series:
  """The model under a schedule, with index keys of a dtype.

  Args:
    config: of the model.
    name: of the schedule: one of the paper's, or any notation.
    key_dtype: "bfloat16", the model's own dtype, or "float8_e4m3fn".

  Raises:
    ValueError: another dtype, or a schedule of another length.
  """
  if key_dtype not in ("bfloat16", "float8_e4m3fn"):
    raise ValueError(
      "`--index_key_dtypes` must be bfloat16 or float8_e4m3fn: got"
      f" {key_dtype!r}."
    )
  return Series(
    name,
    key_dtype,
    config.replace(
      schedule=parse_schedule(name, config.num_hidden_layers),
      index_key_dtype=jnp.float8_e4m3fn if key_dtype[0] == "f" else None,
    ),
  )


def parse_schedule(name: str, num_layers: int) -> ic.ReuseSchedule:
  """The paper's pattern of that name, or any notation."""
  pattern = PAPER_PATTERNS.get(name)
  if pattern is None:
    return ic.ReuseSchedule.parse(name, num_layers)
  if len(pattern) != num_layers:
    raise ValueError(
      f"`--schedules={name}` is the paper's pattern of {len(pattern)} layers:"
      f" got a model of {num_layers}. Give a pattern, uniform:N or freq:N."
    )
  return ic.ReuseSchedule.from_pattern(pattern)
