# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The known ways in which ports of DSA went wrong, each made on purpose.

Every test builds one wrong variant and wants the comparison with transformers
to pass for the right variant and to fail for the wrong one, in the part that
the fault touches: else the comparison would be blind to it.
"""

import contextlib
import functools
from unittest import mock

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import attention, norms, rope
from indexcache_jax import indexer as indexer_lib
from tests.oracle import compare, fixtures


def _with_config(name, **changes):
  fixture = fixtures.load(name)
  return fixture._replace(config=fixture.config.replace(**changes))


def _with_params(name, ending, change):
  """The fixture with `change` applied where a parameter's path ends so."""
  fixture = fixtures.load(name)
  flat = flax.traverse_util.flatten_dict(fixture.params, sep="/")
  hits = [path for path in flat if path.endswith(ending)]
  if not hits:
    raise ValueError(f"no parameter's path ends with {ending!r}: got {[*flat]}")
  changed = flat | {path: change(flat[path]) for path in hits}
  return fixture._replace(
    params=flax.traverse_util.unflatten_dict(changed, sep="/")
  )


def _with_schedule(name, schedule):
  """The fixture under another schedule.

  A layer that owns no indexer gets a copy of its source's, as converted
  checkpoints had it that hid this fault.
  """
  fixture = _with_config(name, schedule=schedule)
  right = fixtures.load(name).config.schedule
  params = dict(fixture.params)
  for layer, source in enumerate(right.source_layers):
    block = dict(params[f"layers_{layer}"])
    block["self_attn"] = block["self_attn"] | {
      "indexer": params[f"layers_{source}"]["self_attn"]["indexer"]
    }
    params[f"layers_{layer}"] = block
  return fixture._replace(params=params)


class PortFaultsTest(parameterized.TestCase):
  def check(
    self, wrong, name, *, selects=True, under=None, length=fixtures.LONG
  ):
    """Wants the right variant to pass and the wrong one to fail.

    Args:
      wrong: fixture with the fault in its config or parameters.
      name: of the right one.
      selects: whether the fault must be seen in the selections too.
      under: context manager that puts the fault into the code.
      length: of the context.
    """
    right = fixtures.compare_right(name, length)
    self.assertTrue(right.is_equal, msg=str(right))
    with under or contextlib.nullcontext():
      comparison = fixtures.compare_with_oracle(wrong, length)
    self.assertFalse(comparison.is_equal, msg=str(comparison))
    # Not by a hair: ten times the tolerance.
    self.assertGreater(comparison.logit_error, 10 * compare.LOGIT_TOLERANCE)
    if selects:
      self.assertGreater(comparison.num_wrong_rows, 0, msg=str(comparison))

  @parameterized.parameters("glm_full", "deepseek_grouped_yarn")
  def test_other_layout_of_indexer_rope(self, name):
    interleave = not fixtures.load(name).config.indexer_rope_interleave
    self.check(_with_config(name, indexer_rope_interleave=interleave), name)

  def test_half_split_rope_in_attention(self):
    # In DeepSeek's model, whose indexer is half-split anyway.
    name = "deepseek_grouped_yarn"
    right = rope.rotate

    def rotate(x, tables, *, interleave):
      del interleave
      return right(x, tables, interleave=False)

    self.check(
      fixtures.load(name), name, under=mock.patch.object(rope, "rotate", rotate)
    )

  def test_key_norm_with_eps_of_the_residual_norms(self):
    name = "glm_small_latents"
    wrong = functools.partial(
      norms.LayerNorm, eps=fixtures.load(name).config.rms_norm_eps
    )
    self.check(
      fixtures.load(name),
      name,
      under=mock.patch.object(norms, "LayerNorm", wrong),
    )

  def test_latent_norms_with_eps_of_the_residual_norms(self):
    name = "glm_small_latents"
    eps = fixtures.load(name).config.rms_norm_eps
    self.check(_with_config(name, latent_norm_eps=eps), name, selects=False)

  @parameterized.parameters("glm_full", "deepseek_grouped_yarn")
  def test_indexer_fed_the_query_latent_before_its_norm(self, name):
    latents = []

    def interceptor(call, args, kwargs, context):
      if isinstance(context.module, indexer_lib.Indexer):
        hidden, _, rotary = args
        args = (hidden, latents[-1], rotary)
      result = call(*args, **kwargs)
      if context.module.name == "q_a_proj":
        latents.append(result)
      return result

    self.check(
      fixtures.load(name), name, under=nn.intercept_methods(interceptor)
    )
    self.assertNotEmpty(latents)

  @parameterized.parameters("glm_full", "deepseek_grouped_yarn")
  def test_key_norm_without_its_bias(self, name):
    self.check(_with_params(name, "k_norm/bias", jnp.zeros_like), name)

  @parameterized.parameters("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
  def test_projection_without_its_bias(self, projection):
    name = "glm_full"
    self.check(_with_params(name, f"{projection}/bias", jnp.zeros_like), name)

  @parameterized.parameters(
    "glm_full", "glm_irregular_grouped", "deepseek_grouped_yarn"
  )
  def test_router_without_its_correction_bias(self, name):
    self.check(
      _with_params(name, "e_score_correction_bias", jnp.zeros_like), name
    )

  @parameterized.parameters("glm_irregular_grouped", "deepseek_grouped_yarn")
  def test_router_without_groups(self, name):
    self.check(_with_config(name, n_group=1, topk_group=1), name)

  @parameterized.parameters("glm_full", "deepseek_grouped_yarn")
  def test_softmax_scale_of_the_latent_width(self, name):
    # The absorbed query is that wide, but the scale is the expanded head's.
    config = fixtures.load(name).config
    scale = config.latent_dim**-0.5 * config.rope.softmax_mscale
    self.check(
      fixtures.load(name),
      name,
      under=mock.patch.object(
        ic.SparseTransformerConfig, "attention_scale", scale
      ),
    )

  def test_softmax_scale_without_yarns_factor(self):
    name = "deepseek_grouped_yarn"
    self.check(
      fixtures.load(name),
      name,
      under=mock.patch.object(ic.RopeConfig, "softmax_mscale", 1.0),
    )

  @parameterized.named_parameters(
    ("offset_too_small", ic.ReuseSchedule.from_freq(8, 4, offset=2)),
    ("offset_too_large", ic.ReuseSchedule.from_freq(8, 4, offset=4)),
    ("freq_too_small", ic.ReuseSchedule.from_freq(8, 3, offset=3)),
    ("uniform_rule_of_the_paper", ic.ReuseSchedule.uniform(8, every=4)),
  )
  def test_frequency_rule_off(self, schedule):
    self.check(_with_schedule("glm_52_rule", schedule), "glm_52_rule")

  @parameterized.parameters("glm_52_rule", "glm_irregular_grouped")
  def test_shared_layer_runs_an_indexer_of_its_own(self, name):
    num_layers = fixtures.load(name).config.num_hidden_layers
    schedule = ic.ReuseSchedule.all_full(num_layers)
    self.check(_with_schedule(name, schedule), name)

  @parameterized.parameters(1, 3)
  def test_leading_full_layers_run_dense(self, num_dense):
    name = "glm_52_rule"
    dense_layers = [f"layers_{layer}" for layer in range(num_dense)]

    def interceptor(call, args, kwargs, context):
      if (
        context.method_name == "_attend"
        and isinstance(context.module, attention.SparseMLA)
        and context.module.path[0] in dense_layers
      ):
        args = (*args[:-1], "dense")
      return call(*args, **kwargs)

    self.check(
      fixtures.load(name), name, under=nn.intercept_methods(interceptor)
    )

  @parameterized.parameters("glm_full", "deepseek_grouped_yarn")
  def test_indexer_faults_are_invisible_below_index_topk(self, name):
    # Why every other test here has five times as many keys.
    interleave = not fixtures.load(name).config.indexer_rope_interleave
    wrong = _with_config(name, indexer_rope_interleave=interleave)
    comparison = fixtures.compare_with_oracle(wrong, fixtures.SHORT)
    self.assertTrue(comparison.is_equal, msg=str(comparison))


if __name__ == "__main__":
  absltest.main()
