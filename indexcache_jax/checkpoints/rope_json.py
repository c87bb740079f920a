# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding in config.json: `rope_parameters`, or the older two fields.

transformers 5 writes `rope_parameters` with `rope_theta` inside; before, it was
`rope_theta` beside `rope_scaling`, whose kind is `type` or `rope_type`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from indexcache_jax import config as config_lib
from indexcache_jax.checkpoints import errors, json_fields

CheckpointError = errors.CheckpointError
RopeConfig = config_lib.RopeConfig

_ORIGINAL = "original_max_position_embeddings"
_YARN_NUMBERS = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_KNOWN = frozenset(
  {
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "attention_factor",
    "truncate",
    _ORIGINAL,
    *_YARN_NUMBERS,
  }
)


def rope_from_json(
  raw: Mapping[str, Any], max_position_embeddings: int
) -> RopeConfig:
  """Translates the rotary embedding of a config.json.

  Args:
    raw: the whole object.
    max_position_embeddings: what YaRN's original context is where the file
      does not give it, as in transformers.

  Raises:
    CheckpointError: for a kind that no DSA checkpoint has, or absurd numbers.
  """
  parameters = _parameters(raw)
  # Inside before beside, as transformers has it.
  theta_from = parameters if parameters.get("rope_theta") is not None else raw
  theta = json_fields.number(theta_from, "rope_theta", 1.0, 1e15, default=1e4)
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  _check_rotated_share(parameters, raw)
  if kind == "default":
    return RopeConfig(rope_theta=theta)
  if kind != "yarn":
    raise CheckpointError(
      "`rope_type` must be 'default' or 'yarn': got"
      f" {kind!r:.80} in config.json. Other kinds are not used by DSA"
      " checkpoints."
    )
  defaults = {"factor": None, "beta_fast": 32.0, "beta_slow": 1.0}
  numbers = {
    field: json_fields.number(parameters, field, 0.0, 1e6, default=value)
    for field, value in defaults.items()
  }
  for field in ("mscale", "mscale_all_dim", "attention_factor"):
    if parameters.get(field) is not None:
      numbers[field] = json_fields.number(parameters, field, 0.0, 1e6)
  original = raw if raw.get(_ORIGINAL) is not None else parameters
  return RopeConfig(
    rope_theta=theta,
    rope_type="yarn",
    original_max_position_embeddings=json_fields.integer(
      original, _ORIGINAL, 1, 2**40, default=max_position_embeddings
    ),
    truncate=json_fields.boolean(parameters, "truncate", True),
    **numbers,
  )


def _check_rotated_share(*sources):
  for source in sources:
    share = json_fields.number(
      source, "partial_rotary_factor", 0.0, 1.0, default=1.0
    )
    if share < 1:
      raise CheckpointError(
        "`partial_rotary_factor` must be 1, `qk_rope_head_dim` is rotated"
        f" whole: got {share} in config.json."
      )


def rope_to_json(rope: RopeConfig) -> dict[str, Any]:
  """Returns `rope_parameters` as transformers 5 writes them."""
  result = {"rope_theta": rope.rope_theta, "rope_type": rope.rope_type}
  if rope.rope_type == "yarn":
    fields = dataclasses.asdict(rope)
    result |= {
      field: value for field, value in fields.items() if value is not None
    }
  return result


def _parameters(raw) -> dict[str, Any]:
  """The one set of parameters that the file gives, under either name."""
  given = {
    field: raw[field]
    for field in ("rope_parameters", "rope_scaling")
    if raw.get(field) is not None
  }
  for field, value in given.items():
    if not isinstance(value, dict):
      raise CheckpointError(
        f"`{field}` must be an object: got {value!r:.80} in config.json."
      )
    unknown = sorted(set(value) - _KNOWN)
    if unknown:
      raise CheckpointError(
        f"`{field}` must have fields among {sorted(_KNOWN)}: got"
        f" {unknown!r:.200} in config.json."
      )
  values = list(given.values())
  if len(values) == 2 and values[0] != values[1]:
    raise CheckpointError(
      "`rope_parameters` and `rope_scaling` must agree where both are given:"
      f" got {values[0]!r:.200} and {values[1]!r:.200} in config.json. Remove"
      " the stale one."
    )
  return values[0] if values else {}
