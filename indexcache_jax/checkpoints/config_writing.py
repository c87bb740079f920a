# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""From our config to a config.json that transformers and the engines load."""

from typing import Any

from absl import logging

from indexcache_jax import config as config_lib
from indexcache_jax.checkpoints import errors, rope_json

CheckpointError = errors.CheckpointError
SparseTransformerConfig = config_lib.SparseTransformerConfig

_ARCHITECTURES = {
  "glm_moe_dsa": "GlmMoeDsaForCausalLM",
  "deepseek_v32": "DeepseekV32ForCausalLM",
}
# Fields of one name, type and meaning on both sides.
_SAME = (
  "model_type",
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "moe_intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "n_shared_experts",
  "n_routed_experts",
  "num_experts_per_tok",
  "n_group",
  "topk_group",
  "norm_topk_prob",
  "routed_scaling_factor",
  "q_lora_rank",
  "kv_lora_rank",
  "qk_nope_head_dim",
  "qk_rope_head_dim",
  "v_head_dim",
  "attention_bias",
  "index_topk",
  "index_n_heads",
  "index_head_dim",
  "indexer_rope_interleave",
  "max_position_embeddings",
  "rms_norm_eps",
  "initializer_range",
)
# transformers builds q_a_layernorm and kv_a_layernorm with this, always.
_LATENT_NORM_EPS = 1e-6


def config_to_json(
  config: SparseTransformerConfig, dtype_name: str
) -> dict[str, Any]:
  """Returns the object of a config.json; `config_from_json` reads it back.

  Args:
    config: to write. `implementation` is no property of a checkpoint and is
      left out.
    dtype_name: of the parameters, "float32" or "bfloat16".

  Raises:
    CheckpointError: for a config that the format cannot say.
  """
  if config.latent_norm_eps != _LATENT_NORM_EPS:
    raise CheckpointError(
      f"`latent_norm_eps` must be {_LATENT_NORM_EPS} in a checkpoint, whose"
      f" format has no field for it: got {config.latent_norm_eps}."
    )
  _warn_about_transformers(config)
  types = list(config.mlp_layer_types)
  num_dense = next(
    (layer for layer, kind in enumerate(types) if kind == "sparse"), len(types)
  )
  if min(config.first_k_dense_replace, len(types)) == num_dense:
    num_dense = config.first_k_dense_replace
  result = {
    "architectures": [_ARCHITECTURES[config.model_type]],
    **{field: getattr(config, field) for field in _SAME},
    "num_key_value_heads": config.num_attention_heads,
    "head_dim": config.qk_rope_head_dim,
    "first_k_dense_replace": num_dense,
    "moe_layer_freq": 1,
    "mlp_layer_types": types,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "rope_parameters": rope_json.rope_to_json(config.rope),
    **config.schedule.to_hf(),
    "dtype": dtype_name,
    "use_cache": True,
  }
  if config.schedule.num_shared:
    # SGLang and vLLM read the pattern where they do not know the list.
    result |= config.schedule.to_sglang()
  return dict(sorted(result.items()))


def _warn_about_transformers(config):
  is_glm = config.model_type == "glm_moe_dsa"
  if config.schedule.num_shared and not is_glm:
    logging.warning(
      "transformers' deepseek_v32 knows no index reuse and will make up the"
      " indexers of the shared layers; SGLang and vLLM read"
      " index_topk_pattern."
    )
  if config.indexer_rope_interleave != is_glm:
    logging.warning(
      "transformers takes the layout of the indexer's RoPE from model_type and"
      " not from indexer_rope_interleave, which is %s here.",
      config.indexer_rope_interleave,
    )
