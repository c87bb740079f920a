# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense MLP and the mixture of experts of DeepSeek-V3 (arXiv 2412.19437)."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

import pallas_kernels
from indexcache_jax import config as config_lib
from indexcache_jax import linear, types

SparseTransformerConfig = config_lib.SparseTransformerConfig


# The platform's default: a model may pin "xla" or one kernel set for attention
# while no such lowering of the experts exists. Jitted for its lowering, which
# layers of one shape then share.
expert_mlp = jax.jit(pallas_kernels.expert_mlp)


# Of a sum that XLA leaves to one thread: fewer than 32.
_RANK_TERMS = 16


class Routing(NamedTuple):
  """Experts of every token, and the weights of their outputs."""

  experts: Int32[Array, "M topk"]
  weights: Float32[Array, "M topk"]


class DenseMLP(nn.Module):
  """`down(silu(gate(x)) * up(x))`."""

  config: SparseTransformerConfig
  intermediate_size: int

  @nn.compact
  def __call__(self, hidden: types.Hidden) -> types.Hidden:
    """Returns the block's output, without the residual."""
    cfg = self.config
    gate = linear.dense(cfg, self.intermediate_size, "gate_proj")(hidden)
    up = linear.dense(cfg, self.intermediate_size, "up_proj")(hidden)
    return linear.dense(cfg, hidden.shape[-1], "down_proj")(
      jax.nn.silu(gate) * up
    )


class SparseMLP(nn.Module):
  """Routed experts plus the shared ones, which the op takes together."""

  config: SparseTransformerConfig

  @nn.compact
  def __call__(self, hidden: types.Hidden) -> types.Hidden:
    """Returns the block's output, without the residual."""
    cfg = self.config
    rows = hidden.reshape(-1, cfg.hidden_size)
    routing = Router(cfg, name="gate")(rows)
    shared = None
    if cfg.n_shared_experts:
      shared = SharedExpert(cfg, name="shared_experts")()
    output = Experts(cfg, name="experts")(rows, routing, shared)
    return output.reshape(hidden.shape)


class Router(nn.Module):
  """Sigmoid routing in float32 with a correction bias that only selects."""

  config: SparseTransformerConfig

  @nn.compact
  def __call__(self, rows: Float[Array, "M H"]) -> Routing:
    """Returns the chosen experts and weights of each row."""
    cfg = self.config
    kernel = self.param(
      "kernel",
      nn.initializers.normal(cfg.initializer_range),
      (cfg.hidden_size, cfg.n_routed_experts),
      cfg.param_dtype,
    )
    bias = self.param(
      "e_score_correction_bias",
      nn.initializers.zeros,
      (cfg.n_routed_experts,),
      jnp.float32,
    )
    return route(linear.float32_product(rows, kernel), bias, cfg)


def route(
  logits: Float32[Array, "M E"],
  correction_bias: Float32[Array, " E"],
  config: SparseTransformerConfig,
) -> Routing:
  """Chooses experts by corrected sigmoid scores, weighs by uncorrected ones.

  With several groups, the `topk_group` groups whose two best experts score
  highest are kept first (DeepSeek-V3, section 2.1.2). Ties go to the lower
  expert.
  """
  scores = jax.nn.sigmoid(logits)
  corrected = scores + correction_bias
  if config.n_group > 1:
    grouped = corrected.reshape(
      -1, config.n_group, logits.shape[-1] // config.n_group
    )
    group_scores = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
    _, kept = jax.lax.top_k(group_scores, config.topk_group)
    is_kept = jnp.any(
      kept[:, :, None] == jnp.arange(config.n_group)[None, None], axis=1
    )
    corrected = jnp.where(is_kept[:, :, None], grouped, -jnp.inf)
    corrected = corrected.reshape(logits.shape)
  experts, weights = _take_best(corrected, scores, config.num_experts_per_tok)
  if config.norm_topk_prob:
    # Term by term: as a reduction it would be one more kernel of a decode step.
    total = sum(jnp.split(weights, weights.shape[-1], axis=-1))
    # 1e-20: the published guard against a sum of zero.
    weights = weights / (total + 1e-20)
  return Routing(experts, weights * config.routed_scaling_factor)


def _take_best(
  keys: Float32[Array, "M E"], values: Float32[Array, "M E"], count: int
) -> tuple[Int32[Array, "M {count}"], Float32[Array, "M {count}"]]:
  """Places of the largest keys of each row, and the values there.

  As `jax.lax.top_k` and a gather do, which XLA runs as a sort and three more
  kernels: with so few keys to compare, two sums are faster on a GPU, above all
  for one token.
  """
  place = jnp.arange(keys.shape[-1], dtype=jnp.int32)
  # So few terms at a time that a thread adds them, not a warp for each sum.
  terms = math.gcd(_RANK_TERMS, keys.shape[-1])
  others = keys.reshape(len(keys), -1, terms, 1)
  is_before = (others > keys[:, None, None]) | (
    (others == keys[:, None, None]) & (place.reshape(-1, terms, 1) < place)
  )
  parts = is_before.sum(axis=2, dtype=jnp.int32)
  rank = sum(parts[:, part] for part in range(parts.shape[1]))
  is_taken = rank[:, None, :] == jnp.arange(count)[:, None]
  # NaN among the keys leaves ranks out: not a sum, which could leave the range.
  return (
    jnp.where(is_taken, place, 0).max(axis=-1),
    jnp.where(is_taken, values[:, None, :], 0).sum(axis=-1),
  )


class Experts(nn.Module):
  """The routed experts."""

  config: SparseTransformerConfig

  @nn.compact
  def __call__(
    self,
    rows: Float[Array, "M H"],
    routing: Routing,
    shared: pallas_kernels.SharedExpert | None,
  ) -> Float[Array, "M H"]:
    """Returns the weighted sum of each row's experts, plus the shared one."""
    cfg = self.config
    wide = (cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size)
    narrow = (wide[0], wide[2], wide[1])
    gate, up, down = (
      self.param(
        name,
        nn.initializers.normal(cfg.initializer_range),
        shape,
        cfg.param_dtype,
      ).astype(cfg.dtype)
      for name, shape in (
        ("gate_proj", wide),
        ("up_proj", wide),
        ("down_proj", narrow),
      )
    )
    return expert_mlp(
      rows, routing.experts, routing.weights, gate, up, down, shared
    )


class SharedExpert(nn.Module):
  """Matrices of the shared experts, with the parameters of a `DenseMLP`."""

  config: SparseTransformerConfig

  @nn.compact
  def __call__(self) -> pallas_kernels.SharedExpert:
    """Returns them in the activations' dtype."""
    cfg = self.config
    wide = (
      cfg.hidden_size,
      cfg.moe_intermediate_size * cfg.n_shared_experts,
    )
    return pallas_kernels.SharedExpert(
      gate=linear.KernelOnly(cfg, wide, name="gate_proj")(),
      up=linear.KernelOnly(cfg, wide, name="up_proj")(),
      down=linear.KernelOnly(cfg, wide[::-1], name="down_proj")(),
    )
