# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where each parameter lies in a published checkpoint.

PyTorch keeps a linear layer as [out, in], flax as [in, out]; published files
keep each expert apart, we keep them stacked. transformers 5 stacks them too and
may write them so, gate above up; `Fused` describes that form.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from indexcache_jax import config as config_lib

SparseTransformerConfig = config_lib.SparseTransformerConfig

INDEXER = "indexer"

# "asked": the caller's dtype. "unrounded": that, unless the source is wider;
# the indexer's head weights are operands of a float32 product, and rounding
# them flips near ties. "float32": always, the router's correction bias.
Precision = Literal["asked", "unrounded", "float32"]


class Fused(NamedTuple):
  """All experts of a layer in one stored tensor [E, rows, in].

  Attributes:
    name: of the stored tensor.
    shape: of the stored tensor.
    first_row: where this parameter's rows begin in each expert's.
  """

  name: str
  shape: tuple[int, int, int]
  first_row: int


class ParamSpec(NamedTuple):
  """One parameter of ours and its sources.

  Attributes:
    path: keys in the nested dict of parameters.
    shape: of the parameter.
    names: its tensor, or one tensor for each expert.
    is_transposed: whether the last two dimensions are swapped in the file.
    precision: how its dtype follows from the asked one.
    fused: the other form in which experts may be stored.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  names: tuple[str, ...]
  is_transposed: bool = False
  precision: Precision = "asked"
  fused: Fused | None = None

  @property
  def is_stacked(self) -> bool:
    """Whether the first dimension runs over experts."""
    return self.fused is not None

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """Shape of each of `names` in the file."""
    shape = self.shape[1:] if self.is_stacked else self.shape
    return shape[::-1] if self.is_transposed else shape


def param_specs(config: SparseTransformerConfig) -> Iterator[ParamSpec]:
  """Yields every parameter of the model under `config.schedule`, in order."""
  hidden, vocab = config.hidden_size, config.vocab_size
  yield ParamSpec(
    ("embed_tokens", "embedding"),
    (vocab, hidden),
    ("model.embed_tokens.weight",),
  )
  for layer in range(config.num_hidden_layers):
    yield from _layer(config, layer)
  yield _norm((), "model.", "norm", hidden)
  yield from _linear((), "", "lm_head", hidden, vocab)


def indexer_specs(
  config: SparseTransformerConfig, layer: int
) -> Iterator[ParamSpec]:
  """Yields the parameters of a layer's indexer, full or not."""
  path = (f"layers_{layer}", "self_attn", INDEXER)
  prefix = f"model.layers.{layer}.self_attn.{INDEXER}."
  hidden, dim = config.hidden_size, config.index_head_dim
  heads = config.index_n_heads
  yield from _linear(path, prefix, "wq_b", config.q_lora_rank, heads * dim)
  yield from _linear(path, prefix, "wk", hidden, dim)
  yield _norm(path, prefix, "k_norm", dim)
  yield ParamSpec((*path, "k_norm", "bias"), (dim,), (f"{prefix}k_norm.bias",))
  for spec in _linear(path, prefix, "weights_proj", hidden, heads):
    yield spec._replace(precision="unrounded")


def _layer(config, layer):
  path, prefix = (f"layers_{layer}",), f"model.layers.{layer}."
  hidden = config.hidden_size
  yield _norm(path, prefix, "input_layernorm", hidden)
  yield from _attention(config, (*path, "self_attn"), f"{prefix}self_attn.")
  if config.schedule.is_full(layer):
    yield from indexer_specs(config, layer)
  yield _norm(path, prefix, "post_attention_layernorm", hidden)
  path, prefix = (*path, "mlp"), f"{prefix}mlp."
  if config.is_sparse_mlp(layer):
    yield from _experts(config, path, prefix)
  else:
    yield from _mlp(path, prefix, hidden, config.intermediate_size)


def _attention(config, path, prefix):
  hidden, heads = config.hidden_size, config.num_attention_heads
  bias = config.attention_bias
  up_dim = config.qk_nope_head_dim + config.v_head_dim
  query_dim = heads * config.qk_head_dim
  yield from _linear(path, prefix, "q_a_proj", hidden, config.q_lora_rank, bias)
  yield _norm(path, prefix, "q_a_layernorm", config.q_lora_rank)
  yield from _linear(path, prefix, "q_b_proj", config.q_lora_rank, query_dim)
  yield from _linear(
    path, prefix, "kv_a_proj_with_mqa", hidden, config.latent_dim, bias
  )
  yield _norm(path, prefix, "kv_a_layernorm", config.kv_lora_rank)
  yield from _linear(
    path, prefix, "kv_b_proj", config.kv_lora_rank, heads * up_dim
  )
  yield from _linear(
    path, prefix, "o_proj", heads * config.v_head_dim, hidden, bias
  )


def _experts(config, path, prefix):
  hidden, inner = config.hidden_size, config.moe_intermediate_size
  experts = config.n_routed_experts
  yield from _linear(path, prefix, "gate", hidden, experts)
  yield ParamSpec(
    (*path, "gate", "e_score_correction_bias"),
    (experts,),
    (f"{prefix}gate.e_score_correction_bias",),
    precision="float32",
  )
  wide, narrow = (experts, 2 * inner, hidden), (experts, hidden, inner)
  for name, shape, fused in (
    ("gate_proj", (hidden, inner), Fused("gate_up_proj", wide, 0)),
    ("up_proj", (hidden, inner), Fused("gate_up_proj", wide, inner)),
    ("down_proj", (inner, hidden), Fused("down_proj", narrow, 0)),
  ):
    yield ParamSpec(
      (*path, "experts", name),
      (experts, *shape),
      tuple(
        f"{prefix}experts.{expert}.{name}.weight" for expert in range(experts)
      ),
      is_transposed=True,
      fused=fused._replace(name=f"{prefix}experts.{fused.name}"),
    )
  if config.n_shared_experts:
    yield from _mlp(
      (*path, "shared_experts"),
      f"{prefix}shared_experts.",
      hidden,
      inner * config.n_shared_experts,
    )


def _mlp(path, prefix, hidden, inner):
  yield from _linear(path, prefix, "gate_proj", hidden, inner)
  yield from _linear(path, prefix, "up_proj", hidden, inner)
  yield from _linear(path, prefix, "down_proj", inner, hidden)


def _linear(path, prefix, name, inputs, outputs, bias=False):
  yield ParamSpec(
    (*path, name, "kernel"),
    (inputs, outputs),
    (f"{prefix}{name}.weight",),
    is_transposed=True,
  )
  if bias:
    yield ParamSpec(
      (*path, name, "bias"), (outputs,), (f"{prefix}{name}.bias",)
    )


def _norm(path, prefix, name, dim):
  return ParamSpec((*path, name, "scale"), (dim,), (f"{prefix}{name}.weight",))
