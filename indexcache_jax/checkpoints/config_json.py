# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""From a published config.json, which nobody vouches for, to our config.

A missing field means what transformers 5 takes it to mean (GlmMoeDsaConfig,
DeepseekV32Config), except that dimensions must be given. A field that would
change the numbers is translated or refused, never passed over.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from absl import logging

from indexcache_jax import config as config_lib
from indexcache_jax import schedule as schedule_lib
from indexcache_jax.checkpoints import errors, folders, json_fields, rope_json

CheckpointError = errors.CheckpointError
SparseTransformerConfig = config_lib.SparseTransformerConfig

CONFIG_NAME = "config.json"
_MAX_CONFIG_BYTES = 2**24
# Layers times experts: 20 thousand in GLM-5; beyond this a config alone could
# take the memory of its list of tensors.
_MAX_EXPERTS = 2**17

# Field: largest sensible value, some ten times that of any known model.
_DIMENSIONS = {
  "vocab_size": 2**24,
  "hidden_size": 2**20,
  "intermediate_size": 2**22,
  "num_hidden_layers": 2**12,
  "num_attention_heads": 2**14,
  "q_lora_rank": 2**18,
  "kv_lora_rank": 2**18,
  "qk_nope_head_dim": 2**14,
  "qk_rope_head_dim": 2**14,
  "v_head_dim": 2**14,
  "index_topk": 2**24,
  "index_n_heads": 2**14,
  "index_head_dim": 2**14,
}
# Field: default of glm_moe_dsa, of deepseek_v32, smallest and largest value.
_INTEGERS = {
  "moe_intermediate_size": (2048, 2048, 0, 2**22),
  "n_routed_experts": (256, 256, 0, 2**16),
  "n_shared_experts": (1, 1, 0, 2**10),
  "num_experts_per_tok": (8, 8, 0, 2**16),
  "n_group": (1, 8, 1, 2**16),
  "topk_group": (1, 4, 1, 2**16),
  "first_k_dense_replace": (3, 3, 0, 2**12),
  "max_position_embeddings": (202752, 163840, 1, 2**40),
}
_NUMBERS = {
  "routed_scaling_factor": (2.5, 2.5, 0.0, 1e6),
  "rms_norm_eps": (1e-5, 1e-6, 0.0, 1.0),
  "initializer_range": (0.02, 0.02, 1e-9, 1e3),
}
_BOOLEANS = {"norm_topk_prob": True, "attention_bias": False}

# What our model does, and the only value that these fields may have; None:
# the field belongs to another architecture.
_FIXED = {
  "hidden_act": "silu",
  "scoring_func": "sigmoid",
  "topk_method": "noaux_tc",
  "tie_word_embeddings": False,
  "mlp_bias": False,
  "rope_interleave": True,
  "mla_use_nope": False,
  "index_kpool": 1,
  "swiglu_limit": None,
  "linear_attn_config": None,
  "sliding_window": None,
}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object of a checkpoint's config.json."""
  return folders.read_json(folder, CONFIG_NAME, _MAX_CONFIG_BYTES)


def config_from_json(raw: Mapping[str, Any]) -> SparseTransformerConfig:
  """Translates config.json.

  Args:
    raw: from `read_config`.

  Returns:
    The config, with the file's own schedule; its `dtype` and `param_dtype` are
    the file's, float32 if it has none.

  Raises:
    CheckpointError: for a model of another kind, and a value of the wrong type,
      out of bounds, or of a meaning that our model does not have.
  """
  model_type = raw.get("model_type")
  if model_type not in ("glm_moe_dsa", "deepseek_v32"):
    raise CheckpointError(
      f"`model_type` must be 'glm_moe_dsa' or 'deepseek_v32': got"
      f" {model_type!r:.80} in {CONFIG_NAME}."
    )
  _check_fixed(raw)
  fields = _dimensions(raw, is_glm=model_type == "glm_moe_dsa")
  dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise CheckpointError(
      f"`dtype` must be one of {sorted(_DTYPES)}: got {dtype!r:.80} in"
      f" {CONFIG_NAME}."
    )
  try:
    return SparseTransformerConfig(
      model_type=model_type,
      mlp_layer_types=_mlp_layer_types(raw, fields),
      schedule=_schedule(raw, fields["num_hidden_layers"]),
      rope=rope_json.rope_from_json(raw, fields["max_position_embeddings"]),
      indexer_rope_interleave=json_fields.boolean(
        raw, "indexer_rope_interleave", None
      ),
      dtype=_DTYPES[dtype],
      param_dtype=_DTYPES[dtype],
      **fields,
    )
  except CheckpointError:
    raise
  except ValueError as error:
    raise CheckpointError(f"{CONFIG_NAME}: {error}") from error


def quantization_block(raw: Mapping[str, Any]) -> tuple[int, int] | None:
  """Returns rows and columns of an FP8 block; None if nothing is quantised.

  Raises:
    CheckpointError: for any quantisation but DeepSeek's FP8 in blocks.
  """
  quantization = raw.get("quantization_config")
  if quantization is None:
    return None
  block = kind = layout = None
  if isinstance(quantization, dict):
    kind = quantization.get("quant_method")
    layout = quantization.get("fmt", "e4m3")
    block = quantization.get("weight_block_size")
  is_block = (
    isinstance(block, list)
    and len(block) == 2
    and all(type(size) is int and 0 < size <= 2**16 for size in block)
  )
  if kind != "fp8" or layout != "e4m3" or not is_block:
    raise CheckpointError(
      "`quantization_config` must be DeepSeek's FP8, quant_method 'fp8', fmt"
      f" 'e4m3', weight_block_size [128, 128]: got {quantization!r:.200}. Take"
      " the bfloat16 or the block FP8 release of this model."
    )
  return block[0], block[1]


def num_mtp_layers(raw: Mapping[str, Any]) -> int:
  """Returns how many multi-token-prediction layers follow the model's."""
  return json_fields.integer(raw, "num_nextn_predict_layers", 0, 64, default=0)


def _check_fixed(raw):
  for field, value in _FIXED.items():
    found = raw.get(field)
    if found is not None and (value is None or found != value):
      rule = "be absent" if value is None else f"be {value!r}"
      raise CheckpointError(
        f"`{field}` must {rule}: got {found!r:.80} in {CONFIG_NAME}. This model"
        " is of a kind that indexcache_jax does not compute."
      )


def _dimensions(raw, *, is_glm):
  fields = {
    field: json_fields.integer(raw, field, 1, high)
    for field, high in _DIMENSIONS.items()
  }
  heads = json_fields.integer(
    raw, "num_key_value_heads", 1, 2**14, default=fields["num_attention_heads"]
  )
  if heads != fields["num_attention_heads"]:
    raise CheckpointError(
      "`num_key_value_heads` must equal `num_attention_heads`, latent attention"
      f" has no groups: got {heads} and {fields['num_attention_heads']} in"
      f" {CONFIG_NAME}."
    )
  raw = _without_aliases(raw)
  for field, (glm, deepseek, low, high) in _INTEGERS.items():
    default = glm if is_glm else deepseek
    fields[field] = json_fields.integer(raw, field, low, high, default=default)
  for field, (glm, deepseek, low, high) in _NUMBERS.items():
    default = glm if is_glm else deepseek
    fields[field] = json_fields.number(raw, field, low, high, default=default)
  for field, default in _BOOLEANS.items():
    fields[field] = json_fields.boolean(raw, field, default)
  if fields["num_hidden_layers"] * fields["n_routed_experts"] > _MAX_EXPERTS:
    raise CheckpointError(
      f"`num_hidden_layers` times `n_routed_experts` must be at most"
      f" {_MAX_EXPERTS}: got {fields['num_hidden_layers']} and"
      f" {fields['n_routed_experts']} in {CONFIG_NAME}."
    )
  return fields


def _without_aliases(raw):
  """The other names of `n_routed_experts` that transformers knows."""
  raw = dict(raw)
  for alias in ("num_local_experts", "num_experts"):
    value = raw.pop(alias, None)
    if value is not None and raw.setdefault("n_routed_experts", value) != value:
      raise CheckpointError(
        f"`{alias}` must equal `n_routed_experts`, whose other name it is: got"
        f" {value!r:.80} and {raw['n_routed_experts']!r:.80} in {CONFIG_NAME}."
      )
  return raw


def _mlp_layer_types(raw, fields):
  num_layers = fields["num_hidden_layers"]
  types = _layer_values(raw, "mlp_layer_types", num_layers)
  if types is not None:
    return tuple(types)
  every = json_fields.integer(raw, "moe_layer_freq", 1, 2**12, default=1)
  first = fields["first_k_dense_replace"]
  return tuple(
    "sparse" if layer >= first and layer % every == 0 else "dense"
    for layer in range(num_layers)
  )


def _schedule(raw, num_layers):
  kinds = _layer_values(raw, "layer_types", num_layers)
  if kinds is not None and set(kinds) != {"deepseek_sparse_attention"}:
    raise CheckpointError(
      "`layer_types` must be 'deepseek_sparse_attention' throughout: got"
      f" {sorted(set(kinds))!r:.200} in {CONFIG_NAME}."
    )
  keys = {"num_hidden_layers": num_layers}
  for field in ("indexer_types", "index_topk_pattern"):
    keys[field] = _layer_values(raw, field, num_layers)
  for field in ("index_topk_freq", "index_skip_topk_offset"):
    keys[field] = raw.get(field)
  return schedule_lib.ReuseSchedule.from_hf(keys)


def _layer_values(raw, field, num_layers):
  """Returns a list of strings, or letters, without those of MTP layers."""
  values = raw.get(field)
  if values is None:
    return None
  is_list = isinstance(values, list) and all(
    isinstance(value, str) for value in values
  )
  if not is_list and not isinstance(values, str):
    raise CheckpointError(
      f"`{field}` must be a list of strings: got {values!r:.200} in"
      f" {CONFIG_NAME}."
    )
  if num_layers < len(values) <= num_layers + num_mtp_layers(raw):
    logging.info("%s: entries of MTP layers left out.", field)
    values = values[:num_layers]
  if len(values) != num_layers:
    raise CheckpointError(
      f"`{field}` must have one entry a layer: got {len(values)} entries for"
      f" num_hidden_layers={num_layers} in {CONFIG_NAME}."
    )
  return values
