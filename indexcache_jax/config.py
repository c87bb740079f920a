# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Frozen, checked configuration of a DSA transformer.

Field names are those of the published `config.json` files, so that a reader of
one can read the other; `checkpoints` translates the files themselves.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from indexcache_jax import schedule as schedule_lib

ReuseSchedule = schedule_lib.ReuseSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary position embedding: plain, or YaRN (arXiv 2309.00071).

  Attributes:
    rope_theta: base of the inverse frequencies.
    rope_type: "default" (plain) or "yarn".
    factor: YaRN's context extension; 1 leaves the frequencies as they are.
    original_max_position_embeddings: context before the extension.
    beta_fast: rotations above which a dimension keeps its frequency.
    beta_slow: rotations below which a dimension is fully interpolated.
    mscale: numerator of the factor on cos and sin; None or 0: not given.
    mscale_all_dim: denominator of that factor, and, squared through
      `softmax_mscale`, a factor of the attention scale; None or 0: not given.
    attention_factor: overrides the factor on cos and sin.
    truncate: round the correction range to whole dimensions.
  """

  rope_theta: float = 10000.0
  rope_type: str = "default"
  factor: float = 1.0
  original_max_position_embeddings: int | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self):
    if self.rope_type not in ("default", "yarn"):
      raise ValueError(
        "`rope_type` must be 'default' or 'yarn': got"
        f" {self.rope_type!r}. Other kinds are not used by DSA checkpoints."
      )
    _check_positive(self, ("rope_theta", "factor", "beta_fast", "beta_slow"))
    if self.rope_type == "yarn" and not self.original_max_position_embeddings:
      raise ValueError(
        "`original_max_position_embeddings` must be given with"
        " rope_type='yarn': got"
        f" {self.original_max_position_embeddings!r}. It is the context of the"
        " model before the extension, 4096 for DeepSeek-V3.2."
      )

  @property
  def embedding_scale(self) -> float:
    """Factor on cos and sin (`attention_scaling` in transformers)."""
    if self.rope_type == "default":
      return 1.0
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
        self.factor, self.mscale_all_dim
      )
    return yarn_mscale(self.factor, 1.0)

  @property
  def softmax_mscale(self) -> float:
    """Factor on the attention scale: `mscale_all_dim`'s mscale, squared."""
    if self.rope_type == "default" or not self.mscale_all_dim:
      return 1.0
    return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
  """YaRN's temperature `0.1 mscale ln(factor) + 1` (arXiv 2309.00071, 3.4)."""
  return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseTransformerConfig:
  """A DSA transformer: DeepSeek-V3.2's or GLM-5's, of any size.

  Attributes:
    model_type: the published family; it fixes the layout of the indexer's
      RoPE where `indexer_rope_interleave` is None.
    vocab_size: rows of the embedding and of the untied head.
    hidden_size: width of the residual stream.
    intermediate_size: inner width of a dense MLP.
    moe_intermediate_size: inner width of one routed expert.
    num_hidden_layers: layers, without multi-token-prediction layers.
    num_attention_heads: heads, all reading the one latent.
    n_shared_experts: shared experts, fused into one MLP of that many widths.
    n_routed_experts: routed experts of a sparse MLP.
    num_experts_per_tok: experts a token is sent to.
    n_group: groups of experts; routing first picks `topk_group` of them.
    topk_group: groups kept for a token.
    norm_topk_prob: divide a token's expert weights by their sum.
    routed_scaling_factor: factor on them after that.
    first_k_dense_replace: leading layers with a dense MLP, where
      `mlp_layer_types` is None.
    mlp_layer_types: "dense" or "sparse" a layer; None: the rule above.
    q_lora_rank: width of the query latent, which the indexer reads too.
    kv_lora_rank: width of the key-value latent without its RoPE part.
    qk_nope_head_dim: width of a head's query and key without position.
    qk_rope_head_dim: width of its rotated part, also of the indexer's.
    v_head_dim: width of a head's value.
    attention_bias: biases on q_a_proj, kv_a_proj_with_mqa and o_proj.
    index_topk: keys that a query attends to.
    index_n_heads: heads of the lightning indexer.
    index_head_dim: width of its heads and of its one key.
    indexer_rope_interleave: layout of the indexer's RoPE; None: half-split for
      deepseek_v32, interleaved for glm_moe_dsa.
    rope: rotary embedding.
    max_position_embeddings: longest context that the checkpoint claims.
    rms_norm_eps: epsilon of the residual stream's norms.
    latent_norm_eps: epsilon of q_a_layernorm and kv_a_layernorm; transformers
      builds them with 1e-6 whatever `rms_norm_eps` says.
    initializer_range: standard deviation of random initial weights.
    schedule: which layers run their indexer; None: all.
    dtype: of activations and matrix products; scores, softmax, norms, routing
      and logits are float32 always.
    param_dtype: of freshly initialised parameters.
    index_key_dtype: of the indexer's products and of its keys in a cache.
      None: `dtype`. jnp.float8_e4m3fn: queries and keys are rotated by a
      Hadamard matrix and rounded with a scale a row, as DeepSeek-V3.2 serves;
      a key takes D + 4 bytes, and some keys at the selection's boundary change.
    implementation: of every kernel op, see `pallas_kernels`; None: the best
      that the platform has.
    shares_rows: neighbouring queries of a prompt read the rows that they both
      select once, where the platform has a kernel for it: faster if a trained
      indexer selects much the same for them, slower if not. See
      `pallas_kernels.sparse_mla`.
  """

  model_type: str = "glm_moe_dsa"
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  moe_intermediate_size: int = 0
  num_hidden_layers: int
  num_attention_heads: int
  n_shared_experts: int = 0
  n_routed_experts: int = 0
  num_experts_per_tok: int = 0
  n_group: int = 1
  topk_group: int = 1
  norm_topk_prob: bool = True
  routed_scaling_factor: float = 1.0
  first_k_dense_replace: int = 0
  mlp_layer_types: tuple[str, ...] | None = None
  q_lora_rank: int
  kv_lora_rank: int
  qk_nope_head_dim: int
  qk_rope_head_dim: int
  v_head_dim: int
  attention_bias: bool = False
  index_topk: int
  index_n_heads: int
  index_head_dim: int
  indexer_rope_interleave: bool | None = None
  rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
  max_position_embeddings: int = 202752
  rms_norm_eps: float = 1e-5
  latent_norm_eps: float = 1e-6
  initializer_range: float = 0.02
  schedule: ReuseSchedule | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  index_key_dtype: Any = None
  implementation: str | None = None
  shares_rows: bool = False

  def __post_init__(self):
    if self.model_type not in ("glm_moe_dsa", "deepseek_v32"):
      raise ValueError(
        "`model_type` must be 'glm_moe_dsa' or 'deepseek_v32': got"
        f" {self.model_type!r}."
      )
    _check_positive(self, _POSITIVE)
    _derive(self, "indexer_rope_interleave", self.model_type == "glm_moe_dsa")
    _derive(
      self, "schedule", ReuseSchedule.from_pattern("F" * self.num_hidden_layers)
    )
    num_dense = min(self.first_k_dense_replace, self.num_hidden_layers)
    _derive(
      self,
      "mlp_layer_types",
      ("dense",) * num_dense
      + ("sparse",) * (self.num_hidden_layers - num_dense),
    )
    _check_schedule(self)
    _check_dims(self)
    _check_index_key_dtype(self)
    _check_experts(self)

  @property
  def qk_head_dim(self) -> int:
    """Width of a head's whole query."""
    return self.qk_nope_head_dim + self.qk_rope_head_dim

  @property
  def latent_dim(self) -> int:
    """C: width of a cached latent row."""
    return self.kv_lora_rank + self.qk_rope_head_dim

  @property
  def quantizes_index_keys(self) -> bool:
    """Whether the indexer's queries and keys are 8-bit floats with scales."""
    return self.index_key_dtype is not None

  @property
  def index_key_bytes(self) -> int:
    """Bytes of one token's index key in a cache, its scale included."""
    if self.quantizes_index_keys:
      return self.index_head_dim + 4
    return self.index_head_dim * jnp.dtype(self.dtype).itemsize

  @property
  def attention_scale(self) -> float:
    """Factor on q.k before the softmax, YaRN's factor included."""
    return self.qk_head_dim**-0.5 * self.rope.softmax_mscale

  def is_sparse_mlp(self, layer: int) -> bool:
    """Whether the layer's MLP is a mixture of experts."""
    return self.mlp_layer_types[layer] == "sparse"

  def replace(self, **changes) -> "SparseTransformerConfig":
    """Returns a checked copy with other fields.

    What follows from a field that gets another value is derived anew, unless it
    is given too: the schedule and the MLP types from `num_hidden_layers`, the
    MLP types from `first_k_dense_replace`, the indexer's RoPE layout from
    `model_type`.
    """
    for field, derived in _DERIVED_FROM.items():
      if changes.get(field, getattr(self, field)) != getattr(self, field):
        changes = dict.fromkeys(derived) | changes
    return dataclasses.replace(self, **changes)


_DERIVED_FROM = {
  "num_hidden_layers": ("schedule", "mlp_layer_types"),
  "first_k_dense_replace": ("mlp_layer_types",),
  "model_type": ("indexer_rope_interleave",),
}
_POSITIVE = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "q_lora_rank",
  "kv_lora_rank",
  "qk_nope_head_dim",
  "qk_rope_head_dim",
  "v_head_dim",
  "index_topk",
  "index_n_heads",
  "index_head_dim",
  "max_position_embeddings",
  "rms_norm_eps",
  "latent_norm_eps",
  "initializer_range",
)


def _derive(config, field: str, value):
  if getattr(config, field) is None:
    object.__setattr__(config, field, value)


def _check_positive(config, fields):
  for field in fields:
    value = getattr(config, field)
    if not value > 0 or math.isinf(value):
      raise ValueError(f"`{field}` must be positive and finite: got {value!r}.")


def _check_schedule(config):
  if config.schedule.num_layers != config.num_hidden_layers:
    raise ValueError(
      "`schedule` must have one entry a layer: got"
      f" {config.schedule.num_layers} entries"
      f" ({config.schedule.pattern!r}) for"
      f" num_hidden_layers={config.num_hidden_layers}."
    )


def _check_dims(config):
  if config.qk_rope_head_dim % 2:
    raise ValueError(
      "`qk_rope_head_dim` must be even, RoPE rotates pairs: got"
      f" {config.qk_rope_head_dim}."
    )
  if config.index_head_dim < config.qk_rope_head_dim:
    raise ValueError(
      "`index_head_dim` must hold the rotated `qk_rope_head_dim`: got"
      f" index_head_dim={config.index_head_dim},"
      f" qk_rope_head_dim={config.qk_rope_head_dim}."
    )


def _check_index_key_dtype(config):
  dtype, dim = config.index_key_dtype, config.index_head_dim
  if dtype is None:
    return
  if dtype != jnp.float8_e4m3fn:
    raise ValueError(
      "`index_key_dtype` must be None (that of `dtype`) or jnp.float8_e4m3fn:"
      f" got {dtype!r}."
    )
  if dim & (dim - 1):
    raise ValueError(
      "`index_head_dim` must be a power of two for the Hadamard rotation of"
      f" `index_key_dtype`=float8_e4m3fn: got {dim}. Leave `index_key_dtype`"
      " None."
    )


def _check_experts(config):
  types = config.mlp_layer_types
  if len(types) != config.num_hidden_layers or set(types) - {"dense", "sparse"}:
    raise ValueError(
      "`mlp_layer_types` must name 'dense' or 'sparse' for each of the"
      f" {config.num_hidden_layers} layers: got {len(types)} entries, {types}."
    )
  if "sparse" not in types:
    return
  _check_positive(
    config,
    (
      "moe_intermediate_size",
      "n_routed_experts",
      "num_experts_per_tok",
      "n_group",
      "topk_group",
    ),
  )
  experts, groups = config.n_routed_experts, config.n_group
  if experts % groups or (groups > 1 and experts // groups < 2):
    raise ValueError(
      "`n_group` must divide `n_routed_experts` into groups of two or more (a"
      " group's score is the sum of its two best experts): got"
      f" n_routed_experts={experts}, n_group={groups}."
    )
  kept = config.topk_group * (experts // groups)
  if config.topk_group > groups or config.num_experts_per_tok > kept:
    raise ValueError(
      "`num_experts_per_tok` experts must fit in `topk_group` of `n_group`"
      f" groups: got num_experts_per_tok={config.num_experts_per_tok},"
      f" topk_group={config.topk_group}, n_group={groups},"
      f" n_routed_experts={experts}."
    )
