# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes the committed fixtures; runs in the oracle's environment.

  python -m tests.oracle.make_golden

Each fixture is there for a fault of a known port, see
`tests/indexcache/port_faults_test.py`; all have 16 indexer heads, and a
context of five times `index_topk` beside one below it.
"""

import pathlib
import shutil

import torch
import transformers

from tests.oracle import draw, oracle

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"

_BASE = {
  "vocab_size": 64,
  "hidden_size": 24,
  "intermediate_size": 24,
  "moe_intermediate_size": 8,
  "num_attention_heads": 2,
  "num_key_value_heads": 2,
  "n_shared_experts": 1,
  "n_routed_experts": 8,
  "num_experts_per_tok": 2,
  "q_lora_rank": 16,
  "kv_lora_rank": 16,
  "qk_nope_head_dim": 8,
  "qk_rope_head_dim": 8,
  "v_head_dim": 8,
  "index_topk": 8,
  "index_n_heads": 16,
  "index_head_dim": 12,
  "max_position_embeddings": 4096,
  "rms_norm_eps": 1e-5,
  "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
_YARN = {
  "rope_type": "yarn",
  "rope_theta": 10000.0,
  "factor": 40.0,
  "original_max_position_embeddings": 4096,
  "beta_fast": 32.0,
  "beta_slow": 1.0,
  "mscale": 1.0,
  "mscale_all_dim": 1.0,
}


def cases() -> list[draw.Case]:
  """Returns the fixtures."""
  return [
    _case("glm_full", 1, ["dense", "sparse", "sparse"], attention_bias=True),
    _case(
      "glm_52_rule",
      2,
      ["dense"] * 3 + ["sparse"] + ["dense"] * 4,
      index_topk_freq=4,
      index_skip_topk_offset=3,
      indexer_rope_interleave=True,
    ),
    _case(
      "glm_irregular_grouped",
      3,
      ["dense", "sparse", "sparse", "dense", "dense"],
      indexer_types=["full", "shared", "full", "full", "shared"],
      n_group=2,
      topk_group=1,
      routed_scaling_factor=2.5,
    ),
    # Small weights make small variances, and eps visible beside them.
    _case(
      "glm_small_latents",
      4,
      ["dense"] * 4,
      weight_scales={
        "indexer.wk": 1e-3,
        "q_a_proj": 1e-3,
        "kv_a_proj_with_mqa": 1e-3,
      },
      index_topk_pattern="FSFS",
    ),
    _case(
      "deepseek_grouped_yarn",
      5,
      ["dense", "sparse", "sparse"],
      model_type="deepseek_v32",
      n_group=4,
      topk_group=2,
      routed_scaling_factor=2.5,
      max_position_embeddings=163840,
      rms_norm_eps=1e-6,
      rope_parameters=_YARN,
    ),
  ]


def _case(name, seed, mlp_layer_types, weight_scales=None, **config):
  return {
    "name": name,
    "config": _BASE
    | {
      "model_type": "glm_moe_dsa",
      "num_hidden_layers": len(mlp_layer_types),
      "mlp_layer_types": mlp_layer_types,
    }
    | config,
    "batch": 2,
    "lengths": [6, 40],
    "seed": seed,
    "weight_scales": weight_scales or {},
  }


def main() -> None:
  """Makes every fixture anew."""
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  for case in cases():
    folder = GOLDEN / case["name"]
    shutil.rmtree(folder, ignore_errors=True)
    oracle.make_case(case, folder)
    (folder / "generation_config.json").unlink()
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{case['name']}: {size} bytes")


if __name__ == "__main__":
  main()
