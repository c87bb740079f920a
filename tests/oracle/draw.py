# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Random tiny DSA models, described; shared by the oracle and by us.

Imports numpy alone, so that both Pythons read it. A case is a plain dict,
JSON all through: what `oracle.py` builds and `compare.py` checks.

  name: of the case and of its folder.
  config: keyword arguments of the transformers configuration.
  batch: sequences.
  lengths: contexts to run, each a prefix of the longest.
  seed: of parameters and tokens.
  weight_scales: factors on the weights whose name contains the key.
"""

from typing import Any

import numpy as np

Case = dict[str, Any]

_YARN = (
  {"mscale": 1.0, "mscale_all_dim": 1.0},
  {"mscale": 0.707, "mscale_all_dim": 1.0},
  {},
)


def draw_cases(seed: int, count: int) -> list[Case]:
  """Returns `count` random cases that cover every property between them.

  Each property goes round its values in a random order of its own, so that a
  run of thirty has them all while their combinations are new with each seed.

  Args:
    seed: of everything random.
    count: of cases.
  """
  rng = np.random.default_rng(seed)
  columns = {
    name: _balanced(rng, values, count) for name, values in _PROPERTIES.items()
  }
  return [
    _draw_case(rng, number, {name: columns[name][number] for name in columns})
    for number in range(count)
  ]


# Half of the models have reuse, which only GLM's class knows.
_PROPERTIES = {
  "family": (
    "deepseek_v32",
    "glm_moe_dsa full",
    "glm_moe_dsa rule",
    "glm_moe_dsa list",
    "glm_moe_dsa pattern",
    "glm_moe_dsa rule",
  ),
  "groups": ((1, 1), (2, 1), (4, 2), (1, 1)),
  "yarn": (True, False),
  "bias": (True, False),
  "is_long": (True, True, True, True, False),
  "num_sparse": (1, 2, 0, 99),
  "rope_theta": (100.0, 1e4, 1e6),
}


def _balanced(rng, values, count) -> list:
  repeated = [values[place % len(values)] for place in range(count)]
  return [repeated[place] for place in rng.permutation(count)]


def _draw_case(rng, number, properties) -> Case:
  family, _, notation = properties["family"].partition(" ")
  # The rule needs room: GLM-5.2's, offset 3, has its first shared layer at 3.
  num_layers = int(rng.integers(5 if notation == "rule" else 3, 7))
  config = {
    "model_type": family,
    "num_hidden_layers": num_layers,
    **_dimensions(rng),
    **_experts(rng, num_layers, properties),
    "attention_bias": properties["bias"],
    "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
    **_rope(rng, properties),
    **_schedule(rng, num_layers, notation),
  }
  if family == "glm_moe_dsa" and rng.integers(2):
    config["indexer_rope_interleave"] = True
  topk = config["index_topk"]
  length = topk * int(rng.integers(4, 6)) + 1
  if not properties["is_long"]:
    length = int(rng.integers(topk - 4, topk + 1))
  return {
    "name": f"{number:02}_{family}_{notation or 'full'}",
    "config": config,
    "batch": 2,
    "lengths": [length],
    "seed": int(rng.integers(2**31)),
    "weight_scales": {},
  }


def _dimensions(rng) -> dict[str, Any]:
  rope_dim = int(rng.choice([4, 8]))
  heads = int(rng.choice([2, 4]))
  return {
    "vocab_size": 64,
    "hidden_size": int(rng.choice([24, 32])),
    "intermediate_size": int(rng.choice([24, 40])),
    "num_attention_heads": heads,
    "num_key_value_heads": heads,
    "q_lora_rank": int(rng.choice([16, 24])),
    "kv_lora_rank": int(rng.choice([16, 32])),
    "qk_nope_head_dim": int(rng.choice([8, 12])),
    "qk_rope_head_dim": rope_dim,
    "v_head_dim": int(rng.choice([8, 16])),
    "index_topk": int(rng.integers(8, 13)),
    "index_n_heads": int(rng.choice([16, 24])),
    "index_head_dim": rope_dim + int(rng.choice([4, 8])),
  }


def _experts(rng, num_layers, properties) -> dict[str, Any]:
  groups, kept = properties["groups"]
  num_sparse = min(properties["num_sparse"], num_layers)
  types = ["sparse"] * num_sparse + ["dense"] * (num_layers - num_sparse)
  return {
    "mlp_layer_types": [types[place] for place in rng.permutation(num_layers)],
    "moe_intermediate_size": int(rng.choice([8, 16])),
    "n_routed_experts": 8,
    "n_shared_experts": int(rng.integers(1, 3)),
    "num_experts_per_tok": int(rng.integers(2, 4)),
    "n_group": groups,
    "topk_group": kept,
    "norm_topk_prob": bool(rng.integers(4)),
    "routed_scaling_factor": float(rng.choice([1.0, 2.5])),
  }


def _rope(rng, properties) -> dict[str, Any]:
  rope = {"rope_type": "default", "rope_theta": properties["rope_theta"]}
  if not properties["yarn"]:
    return {"rope_parameters": rope, "max_position_embeddings": 4096}
  factor, original = float(rng.choice([4, 40])), int(rng.choice([32, 4096]))
  rope |= {
    "rope_type": "yarn",
    "factor": factor,
    "original_max_position_embeddings": original,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    **_YARN[rng.integers(len(_YARN))],
  }
  return {
    "rope_parameters": rope,
    "max_position_embeddings": round(factor * original),
  }


def _schedule(rng, num_layers, notation) -> dict[str, Any]:
  if notation == "rule":
    offset = int(rng.choice([2, 3, 3]))
    return {"index_topk_freq": 4, "index_skip_topk_offset": offset}
  letters = "F" + "".join(rng.choice(["F", "S", "S"], num_layers - 1))
  if notation == "pattern":
    return {"index_topk_pattern": letters}
  if notation == "list":
    names = {"F": "full", "S": "shared"}
    return {"indexer_types": [names[letter] for letter in letters]}
  return {}
