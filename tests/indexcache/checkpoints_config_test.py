# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import json

import jax.numpy as jnp
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from indexcache_jax import checkpoints
from indexcache_jax.checkpoints import config_json, config_writing
from tests.indexcache import checkpoints_toy, toy

# The figures of deepseek-ai/DeepSeek-V3.2, in the form before transformers 5.
DEEPSEEK = {
  "architectures": ["DeepseekV32ForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "ep_size": 1,
  "first_k_dense_replace": 3,
  "hidden_act": "silu",
  "hidden_size": 7168,
  "index_head_dim": 128,
  "index_n_heads": 64,
  "index_topk": 2048,
  "initializer_range": 0.02,
  "intermediate_size": 18432,
  "kv_lora_rank": 512,
  "max_position_embeddings": 163840,
  "model_type": "deepseek_v32",
  "moe_intermediate_size": 2048,
  "moe_layer_freq": 1,
  "n_group": 8,
  "n_routed_experts": 256,
  "n_shared_experts": 1,
  "norm_topk_prob": True,
  "num_attention_heads": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 61,
  "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1,
  "q_lora_rank": 1536,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
  },
  "rms_norm_eps": 1e-06,
  "rope_scaling": {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
  },
  "rope_theta": 10000,
  "routed_scaling_factor": 2.5,
  "scoring_func": "sigmoid",
  "tie_word_embeddings": False,
  "topk_group": 4,
  "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16",
  "v_head_dim": 128,
  "vocab_size": 129280,
}


def tiny(**changes):
  raw = config_writing.config_to_json(toy.config(), "float32") | changes
  return {key: value for key, value in raw.items() if value is not ...}


class PublishedTest(parameterized.TestCase):
  @parameterized.parameters(*ic.PRESETS)
  def test_presets_round_trip(self, name):
    config = ic.PRESETS[name]()
    raw = config_writing.config_to_json(config, jnp.dtype(config.dtype).name)
    self.assertEqual(
      config_json.config_from_json(json.loads(json.dumps(raw))), config
    )

  def test_deepseek(self):
    self.assertEqual(
      config_json.config_from_json(DEEPSEEK), ic.PRESETS["deepseek_v32"]()
    )
    self.assertEqual(config_json.quantization_block(DEEPSEEK), (128, 128))
    self.assertEqual(config_json.num_mtp_layers(DEEPSEEK), 1)

  def test_glm_5_2_with_everything_that_its_file_repeats(self):
    expected = ic.PRESETS["glm_5_2"]()
    raw = config_writing.config_to_json(expected, "bfloat16") | {
      "index_topk_freq": 4,
      "index_skip_topk_offset": 3,
      "index_topk_pattern": None,
      "index_share_for_mtp_iteration": True,
      "num_nextn_predict_layers": 1,
      "rope_interleave": True,
      "head_dim": 192,
    }
    self.assertEqual(config_json.config_from_json(raw), expected)
    raw["indexer_types"] = None
    self.assertEqual(config_json.config_from_json(raw), expected)

  def test_missing_fields_mean_the_defaults_of_transformers(self):
    optional = ("n_group", "topk_group", "rms_norm_eps", "mlp_layer_types")
    optional += ("routed_scaling_factor", "rope_scaling", "rope_theta")
    raw = {key: DEEPSEEK[key] for key in DEEPSEEK if key not in optional}
    config = config_json.config_from_json(raw)
    self.assertEqual((config.n_group, config.topk_group), (8, 4))
    self.assertEqual(config.rms_norm_eps, 1e-6)
    self.assertEqual(config.rope, ic.RopeConfig(rope_theta=10000.0))
    config = config_json.config_from_json(
      raw | {"model_type": "glm_moe_dsa", "torch_dtype": None}
    )
    self.assertEqual((config.n_group, config.rms_norm_eps), (1, 1e-5))
    self.assertEqual(config.dtype, jnp.float32)


class TranslationTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"indexer_types": ["full", "shared", "full", "full"]}, "FSFF"),
    ({"index_topk_pattern": "FSSF"}, "FSSF"),
    ({"index_topk_pattern": "FFSF", "index_topk_freq": 2}, "FFSF"),
    ({"index_topk_freq": 4, "index_skip_topk_offset": None}, "FFSS"),
    ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFS"),
    ({"index_topk_freq": None}, "FFFF"),
    # One entry more, of the layer that predicts a further token.
    ({"index_topk_pattern": "FSSFF", "num_nextn_predict_layers": 1}, "FSSF"),
  )
  def test_schedules(self, changes, pattern):
    config = config_json.config_from_json(
      tiny(**{"indexer_types": ..., **changes})
    )
    self.assertEqual(config.schedule.pattern, pattern)

  def test_mlp_types(self):
    def types(**changes):
      config = config_json.config_from_json(
        tiny(**{"mlp_layer_types": ..., **changes})
      )
      return "".join(kind[0] for kind in config.mlp_layer_types)

    self.assertEqual(types(first_k_dense_replace=2), "ddss")
    self.assertEqual(types(moe_layer_freq=2), "ddsd")
    self.assertEqual(
      types(mlp_layer_types=["dense", "sparse"] * 2, moe_layer_freq=3), "dsds"
    )

  @parameterized.parameters(
    ({"rope_parameters": {"rope_theta": 8e6, "rope_type": "default"}}, 8e6),
    # Within before beside.
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 7.0}, 5e5),
    ({"rope_parameters": ..., "rope_theta": 1000000}, 1e6),
    ({"rope_parameters": ...}, 1e4),
  )
  def test_rope_theta(self, changes, theta):
    config = config_json.config_from_json(tiny(**changes))
    self.assertEqual(config.rope, ic.RopeConfig(rope_theta=theta))

  def test_yarn_takes_the_context_from_the_model(self):
    config = config_json.config_from_json(
      tiny(rope_parameters={"rope_type": "yarn", "factor": 2})
    )
    self.assertEqual(config.rope.original_max_position_embeddings, 256)
    self.assertEqual(config.rope.factor, 2.0)

  def test_indexer_rope_follows_the_family_unless_told(self):
    for changes, expected in (
      ({"indexer_rope_interleave": None}, True),
      ({"indexer_rope_interleave": False}, False),
    ):
      config = config_json.config_from_json(tiny(**changes))
      self.assertEqual(config.indexer_rope_interleave, expected)

  def test_cannot_write_what_the_format_does_not_say(self):
    with self.assertRaisesRegex(ValueError, "`latent_norm_eps` must be 1e-06"):
      config_writing.config_to_json(toy.config(latent_norm_eps=1e-5), "float32")

  def test_warns_where_transformers_would_differ(self):
    config = toy.config(
      "FSSF", model_type="deepseek_v32", indexer_rope_interleave=True
    )
    with self.assertLogs("absl", "WARNING") as logs:
      config_writing.config_to_json(config, "float32")
    self.assertIn("deepseek_v32 knows no index reuse", logs.output[0])
    self.assertIn("indexer_rope_interleave", logs.output[1])


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"model_type": "llama"}, "`model_type` must be .*got 'llama'"),
    ({"model_type": ["glm_moe_dsa"]}, "`model_type` must be"),
    ({"hidden_size": -3}, "`hidden_size` must be an integer from 1 to .*-3"),
    ({"hidden_size": 10**30}, "`hidden_size` must be .*got 1000"),
    ({"hidden_size": 10**100}, "got an integer of 333 bits"),
    ({"hidden_size": 32.0}, "`hidden_size` must be an integer.*got 32.0"),
    ({"hidden_size": "32"}, "`hidden_size` must be an integer.*got '32'"),
    ({"hidden_size": True}, "`hidden_size` must be an integer.*got True"),
    ({"hidden_size": ...}, "`hidden_size` must be an integer.*got nothing"),
    ({"q_lora_rank": None}, "`q_lora_rank` must be an integer.*got nothing"),
    ({"num_hidden_layers": 10**9}, "`num_hidden_layers` must be .*to 4096"),
    ({"num_hidden_layers": 5}, "must have one entry a layer: got 4 .*=5"),
    ({"n_routed_experts": 65536}, "times `n_routed_experts` must be at most"),
    ({"num_experts": 4}, "`num_experts` must equal `n_routed_experts`.*4 and"),
    ({"n_group": 3}, "config.json: `n_group` must divide"),
    ({"num_key_value_heads": 1}, "`num_key_value_heads` must equal.*1 and 2"),
    ({"rms_norm_eps": -1.0}, "`rms_norm_eps` must be a number from 0 to 1"),
    ({"rms_norm_eps": 0}, "config.json: `rms_norm_eps` must be positive"),
    ({"routed_scaling_factor": float("inf")}, "`routed_scaling_factor`.*inf"),
    ({"norm_topk_prob": 1}, "`norm_topk_prob` must be true or false: got 1"),
    ({"hidden_act": "gelu"}, "`hidden_act` must be 'silu': got 'gelu'"),
    ({"scoring_func": "softmax"}, "`scoring_func` must be 'sigmoid'"),
    ({"topk_method": "greedy"}, "`topk_method` must be 'noaux_tc'"),
    ({"tie_word_embeddings": True}, "`tie_word_embeddings` must be False"),
    ({"rope_interleave": False}, "`rope_interleave` must be True: got False"),
    ({"swiglu_limit": 7.0}, "`swiglu_limit` must be absent: got 7.0"),
    ({"index_kpool": 4}, "`index_kpool` must be 1: got 4"),
    ({"dtype": "float16"}, "`dtype` must be one of .*got 'float16'"),
    ({"indexer_types": ["full", "half"] * 2}, "got 'half' at layer 1"),
    ({"indexer_types": ["shared"] * 4}, "must begin with F"),
    ({"indexer_types": [["full"]] * 4}, "`indexer_types` must be a list of st"),
    ({"indexer_types": 4}, "`indexer_types` must be a list of strings: got 4"),
    ({"indexer_types": ["full"] * 9}, "got 9 entries for num_hidden_layers=4"),
    (
      {"indexer_types": ..., "index_topk_freq": 0},
      "index_topk_freq. must be at least 1: got 0",
    ),
    ({"mlp_layer_types": ["moe"] * 4}, "`mlp_layer_types` must name 'dense'"),
    ({"layer_types": ["full_attention"] * 4}, "`layer_types` must be 'deepse"),
    ({"moe_layer_freq": 0, "mlp_layer_types": ...}, "`moe_layer_freq` must be"),
    ({"rope_parameters": "yarn"}, "`rope_parameters` must be an object"),
    (
      {"rope_parameters": {"rope_type": "llama3", "factor": 2}},
      "`rope_type` must be 'default' or 'yarn': got 'llama3'",
    ),
    (
      {"rope_parameters": {"rope_theta": 1e4, "low_freq_factor": 1}},
      "`rope_parameters` must have fields among .*low_freq_factor",
    ),
    (
      {"rope_parameters": {"rope_type": "yarn"}},
      "`factor` must be a number from 0 to 1e.06: got nothing",
    ),
    (
      {"rope_parameters": {"rope_theta": 0}},
      "`rope_theta` must be a number from 1 to",
    ),
    ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be 1"),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
      "`rope_parameters` and `rope_scaling` must agree",
    ),
  )
  def test_says_the_rule_and_the_value(self, changes, message):
    with self.assertRaisesRegex(checkpoints.CheckpointError, message):
      config_json.config_from_json(tiny(**changes))

  @parameterized.parameters(
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "fp8", "weight_block_size": None},
    {"quant_method": "fp8", "weight_block_size": [0, 128]},
    {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]},
  )
  def test_other_quantisations(self, **quantization):
    with self.assertRaisesRegex(ValueError, "`quantization_config` must be De"):
      config_json.quantization_block({"quantization_config": quantization})

  @parameterized.parameters(
    (b"", "config.json must be JSON: Expecting value"),
    (b"{'model_type': 1}", "must be JSON"),
    (b"\xff\xfe", "must be JSON: .*utf-8"),
    (b"[1, 2]", "must be a JSON object: got a list"),
    (b"null", "must be a JSON object: got a NoneType"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', "twice: got 'c'"),
    (b'{"rms_norm_eps": NaN}', "numbers must be finite: got NaN"),
    (b'{"a": ' + b"9" * 5000 + b"}", "must be JSON: Exceeds the limit"),
    (b'{"a": ' + b"[" * 100_000, "must be JSON: .*recursion"),
    (b" " * (2**24 + 1), "config.json must have at most 16777216 bytes"),
  )
  def test_files(self, content, message):
    folder = checkpoints_toy.temporary_folder(self)
    (folder / "config.json").write_bytes(content)
    with self.assertRaisesRegex(checkpoints.CheckpointError, message):
      checkpoints.load_config(folder)


if __name__ == "__main__":
  absltest.main()
