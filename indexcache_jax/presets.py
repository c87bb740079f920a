# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Published models and our own sizes; each figure with its source.

Sources: [V3.2] config.json of deepseek-ai/DeepSeek-V3.2; [GLM-5] config.json
of zai-org/GLM-5 and the defaults of transformers' GlmMoeDsaConfig; [GLM-5.2]
config.json of zai-org/GLM-5.2; [Flash] the defaults of transformers'
Glm4MoeLiteConfig (GLM-4.7-Flash); [IC] IndexCache, arXiv 2603.12201; [ours] a
choice of this project.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from indexcache_jax import config as config_lib
from indexcache_jax import schedule as schedule_lib

SparseTransformerConfig = config_lib.SparseTransformerConfig
RopeConfig = config_lib.RopeConfig


def deepseek_v32() -> SparseTransformerConfig:
  """DeepSeek-V3.2, 61 layers (its one MTP layer left out). All [V3.2]."""
  return SparseTransformerConfig(
    model_type="deepseek_v32",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    n_shared_experts=1,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    first_k_dense_replace=3,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index_topk=2048,
    index_n_heads=64,
    index_head_dim=128,
    rope=RopeConfig(
      rope_theta=10000.0,
      rope_type="yarn",
      factor=40.0,
      original_max_position_embeddings=4096,
      beta_fast=32.0,
      beta_slow=1.0,
      mscale=1.0,
      mscale_all_dim=1.0,
    ),
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
  )


def glm_5() -> SparseTransformerConfig:
  """GLM-5, 78 layers, an indexer in each. All [GLM-5]."""
  return SparseTransformerConfig(
    model_type="glm_moe_dsa",
    vocab_size=154880,
    hidden_size=6144,
    intermediate_size=12288,
    moe_intermediate_size=2048,
    num_hidden_layers=78,
    num_attention_heads=64,
    n_shared_experts=1,
    n_routed_experts=256,
    num_experts_per_tok=8,
    routed_scaling_factor=2.5,
    first_k_dense_replace=3,
    q_lora_rank=2048,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    index_topk=2048,
    index_n_heads=32,
    index_head_dim=128,
    rope=RopeConfig(rope_theta=1e6),
    max_position_embeddings=202752,
    rms_norm_eps=1e-5,
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
  )


def glm_5_1() -> SparseTransformerConfig:
  """GLM-5.1: GLM-5's dimensions, `index_topk_freq` null (all full) [GLM-5]."""
  return glm_5()


def glm_5_2() -> SparseTransformerConfig:
  """GLM-5.2: GLM-5's dimensions with index reuse; the rest is [GLM-5.2].

  `index_topk_freq` 4, `index_skip_topk_offset` 3: 21 full and 57 shared
  layers, full at 0, 1, 2, 6, 10, ..., 74. `rope_theta` 8e6 without YaRN, a
  context of 1,048,576.
  """
  config = glm_5()
  return config.replace(
    schedule=schedule_lib.ReuseSchedule.from_freq(
      config.num_hidden_layers, 4, offset=3
    ),
    rope=RopeConfig(rope_theta=8e6),
    max_position_embeddings=1048576,
  )


def glm_47_flash_dsa() -> SparseTransformerConfig:
  """The paper's 30B model: GLM-4.7-Flash turned into DSA, 47 layers.

  Dimensions [Flash]; `index_topk` [IC]. The paper does not give the indexer's
  size: 32 heads of 128, GLM-5's, is an assumption [ours].
  """
  return SparseTransformerConfig(
    model_type="glm_moe_dsa",
    vocab_size=154880,
    hidden_size=2048,
    intermediate_size=10240,
    moe_intermediate_size=1536,
    num_hidden_layers=47,
    num_attention_heads=20,
    n_shared_experts=1,
    n_routed_experts=64,
    num_experts_per_tok=4,
    routed_scaling_factor=1.8,
    first_k_dense_replace=1,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    index_topk=2048,
    index_n_heads=32,
    index_head_dim=128,
    rope=RopeConfig(rope_theta=1e6),
    max_position_embeddings=202752,
    rms_norm_eps=1e-5,
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
  )


def small() -> SparseTransformerConfig:
  """The embedded byte-level model: 12 layers, 5.5M parameters. All [ours].

  `index_topk` is 1/32 of the context that it is trained at, so that which
  keys a layer selects matters as it does at 2048 of 64K.
  """
  return SparseTransformerConfig(
    model_type="glm_moe_dsa",
    vocab_size=256,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=4,
    first_k_dense_replace=12,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    index_topk=32,
    index_n_heads=16,
    index_head_dim=32,
    max_position_embeddings=1024,
    initializer_range=0.05,
  )


def paper() -> SparseTransformerConfig:
  """The byte-level model of `experiments.paper_runs`: 68M parameters [ours].

  `index_topk` is 1/32 of the context that it is trained at, 8192. A latent row
  has 128 columns, what both the sparse kernels and cuDNN's dense attention take
  without padding.
  """
  return SparseTransformerConfig(
    model_type="glm_moe_dsa",
    vocab_size=256,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=16,
    num_attention_heads=8,
    first_k_dense_replace=16,
    q_lora_rank=256,
    kv_lora_rank=96,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    index_topk=256,
    index_n_heads=16,
    index_head_dim=64,
    rope=RopeConfig(rope_theta=1e6),
    max_position_embeddings=8192,
    initializer_range=0.03,
  )


def tiny() -> SparseTransformerConfig:
  """A few thousand parameters with every feature, for tests. All [ours]."""
  return SparseTransformerConfig(
    model_type="glm_moe_dsa",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
    first_k_dense_replace=1,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    index_topk=8,
    index_n_heads=16,
    index_head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.2,
  )


PRESETS: Mapping[str, Callable[[], SparseTransformerConfig]] = {
  function.__name__: function
  for function in (
    deepseek_v32,
    glm_5,
    glm_5_1,
    glm_5_2,
    glm_47_flash_dsa,
    small,
    paper,
    tiny,
  )
}
