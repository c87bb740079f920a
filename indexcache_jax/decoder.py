# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""One decoder layer; the same definition for full, shared and run-time."""

import flax.linen as nn
from jaxtyping import Array, Int32

from indexcache_jax import attention, mlp, norms, types
from indexcache_jax import config as config_lib


class DecoderLayer(nn.Module):
  """Pre-norm attention and MLP, both residual.

  Two layers of one MLP kind are equal modules, so a compiled layer serves all
  layers of its kind.

  Attributes:
    config: of the model.
    use_experts: whether the MLP is a mixture of experts.
  """

  config: config_lib.SparseTransformerConfig
  use_experts: bool

  @nn.compact
  def __call__(
    self,
    hidden: types.Hidden,
    context: attention.AttentionContext,
    index: attention.IndexState | None = None,
    cache: attention.LayerCache | None = None,
    is_full: bool | Int32[Array, ""] = True,
    kind: attention.AttentionKind = "sparse",
  ) -> tuple[
    types.Hidden,
    attention.IndexState,
    attention.LayerCache | None,
    attention.AttentionInputs,
  ]:
    """Runs the layer; arguments and results are those of `SparseMLA`."""
    cfg = self.config
    attended, index, cache, inputs = attention.SparseMLA(cfg, name="self_attn")(
      self._norm("input_layernorm")(hidden),
      context,
      index,
      cache,
      is_full,
      kind,
    )
    hidden = hidden + attended
    block = (
      mlp.SparseMLP(cfg, name="mlp")
      if self.use_experts
      else mlp.DenseMLP(cfg, cfg.intermediate_size, name="mlp")
    )
    hidden = hidden + block(self._norm("post_attention_layernorm")(hidden))
    return hidden, index, cache, inputs

  def _norm(self, name):
    cfg = self.config
    return norms.RMSNorm(
      eps=cfg.rms_norm_eps, param_dtype=cfg.param_dtype, name=name
    )
