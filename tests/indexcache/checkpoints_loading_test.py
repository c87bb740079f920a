# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import io
import tracemalloc
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized
from flax import traverse_util

import indexcache_jax as ic
from indexcache_jax import checkpoints
from indexcache_jax.checkpoints import fp8, safetensors_files
from tests.indexcache import checkpoints_toy, toy

LAYER = "model.layers.1."


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = checkpoints_toy.temporary_folder(self) / "checkpoint"


def dequantized(quantized, scale, block):
  """`numpy.kron` spells the blocks out; rows and columns are cut off."""
  factors = np.kron(scale, np.ones(block, np.float32))
  rows, columns = quantized.shape
  return quantized.astype(np.float32) * factors[:rows, :columns]


def quantize(tensors, block, rng, names):
  """Replaces matrices by random FP8; returns what they stand for."""
  expected = {}
  for name in names:
    shape = tensors[name].shape
    scale_shape = shape[:-2] + tuple(
      -(-size // step) for size, step in zip(shape[-2:], block, strict=True)
    )
    quantized = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, size=scale_shape).astype(np.float32)
    tensors[name], tensors[name + "_scale_inv"] = quantized, scale
    if len(shape) == 2:
      expected[name] = dequantized(quantized, scale, block)
    else:
      expected[name] = np.stack(
        [
          dequantized(*pair, block)
          for pair in zip(quantized, scale, strict=True)
        ]
      )
  return expected


class Fp8Test(CheckpointsTest):
  @parameterized.parameters(
    ((128, 128), 0), ((256, 384), 0), ((300, 200), 0), ((129, 1), 0),
    ((1, 257), 0), ((300, 200), 70),
  )  # fmt: skip
  def test_dequantises_as_numpy_does(self, shape, first_row):
    rng = np.random.default_rng(0)
    whole = (shape[0] + first_row, shape[1])
    quantized = rng.normal(size=whole).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(1e-4, 2, fp8.scale_shape(whole, (128, 128)))
    scale = scale.astype(np.float32)
    expected = dequantized(quantized, scale, (128, 128))[first_row:]
    for dtype in (np.float32, ml_dtypes.bfloat16):
      # A transposed view, as in our layout.
      target = np.full(shape[::-1], np.nan, dtype).T
      fp8.dequantize_into(
        target, quantized[first_row:], scale, (128, 128), first_row
      )
      np.testing.assert_array_equal(target, expected.astype(dtype))

  @parameterized.product(
    dtype=(jnp.float32, jnp.bfloat16), block=((128, 128), (12, 20))
  )
  def test_loads(self, dtype, block):
    checkpoints_toy.save(self.folder)
    names = (
      LAYER + "self_attn.o_proj.weight",
      LAYER + "self_attn.indexer.wq_b.weight",
      LAYER + "mlp.experts.3.down_proj.weight",
    )
    expected = {}
    checkpoints_toy.edit_tensors(
      self.folder,
      lambda tensors: expected.update(
        quantize(tensors, block, np.random.default_rng(0), names)
      ),
    )
    checkpoints_toy.edit_config(
      self.folder,
      quantization_config={
        "quant_method": "fp8", "weight_block_size": list(block)
      },
    )  # fmt: skip
    layer = checkpoints_toy.load(self.folder, dtype)[1]["layers_1"]
    for name, value in zip(
      names,
      (
        layer["self_attn"]["o_proj"]["kernel"],
        layer["self_attn"]["indexer"]["wq_b"]["kernel"],
        layer["mlp"]["experts"]["down_proj"][3],
      ),
      strict=True,
    ):
      np.testing.assert_array_equal(value, expected[name].T.astype(dtype))

  def test_scale_faults(self):
    checkpoints_toy.save(self.folder)
    names = [f"{LAYER}self_attn.{part}_proj.weight" for part in "oo"]
    names[1] = LAYER + "self_attn.q_b_proj.weight"

    def edit(tensors):
      quantize(tensors, (128, 128), np.random.default_rng(0), names)
      del tensors[names[0] + "_scale_inv"]
      tensors[names[1] + "_scale_inv"] = np.zeros((1, 2), np.float32)
      tensors["lm_head.weight_scale_inv"] = np.zeros((1, 1), np.float32)

    checkpoints_toy.edit_tensors(self.folder, edit)
    with self.assertRaises(checkpoints.CheckpointError) as error:
      checkpoints_toy.load(self.folder)
    for part in (
      "o_proj.weight_scale_inv': expected shape (1, 1)",
      "q_b_proj.weight_scale_inv': expected shape (1, 1), found (1, 2)",
      "unexpected tensors (1):\n  'lm_head.weight_scale_inv'",
    ):
      self.assertIn(part, str(error.exception))


def fuse(tensors, layer, num_experts=8):
  """Stacks a layer's experts as transformers 5 keeps them in memory."""
  prefix = f"model.layers.{layer}.mlp.experts."
  stacked = {
    name: np.stack(
      [
        tensors.pop(f"{prefix}{expert}.{name}.weight")
        for expert in range(num_experts)
      ]
    )
    for name in ("gate_proj", "up_proj", "down_proj")
  }
  tensors[prefix + "gate_up_proj"] = np.concatenate(
    [stacked["gate_proj"], stacked["up_proj"]], axis=1
  )
  tensors[prefix + "down_proj"] = stacked["down_proj"]


class FusedExpertsTest(CheckpointsTest):
  def test_both_forms_in_one_checkpoint(self):
    _, params = checkpoints_toy.save(self.folder)
    checkpoints_toy.edit_tensors(self.folder, lambda x: fuse(x, layer=2))
    _, found = checkpoints_toy.load(self.folder)
    checkpoints_toy.assert_bits_equal(self, params, found)

  def test_fp8_with_blocks_across_gate_and_up(self):
    checkpoints_toy.save(self.folder)
    names = [
      LAYER + "mlp.experts.gate_up_proj",
      LAYER + "mlp.experts.down_proj",
    ]
    block, expected = (12, 20), {}

    def edit(tensors):
      fuse(tensors, layer=1)
      rng = np.random.default_rng(0)
      expected.update(quantize(tensors, block, rng, names))

    checkpoints_toy.edit_tensors(self.folder, edit)
    checkpoints_toy.edit_config(
      self.folder,
      quantization_config={
        "quant_method": "fp8", "weight_block_size": list(block)
      },
    )  # fmt: skip
    experts = checkpoints_toy.load(self.folder)[1]["layers_1"]["mlp"]["experts"]
    gate, up = np.split(expected[names[0]], 2, axis=1)
    for name, value in (
      ("gate_proj", gate),
      ("up_proj", up),
      ("down_proj", expected[names[1]]),
    ):
      np.testing.assert_array_equal(experts[name], value.transpose(0, 2, 1))


class LeftOutTest(CheckpointsTest):
  @parameterized.parameters(
    # Announced by config.json, or told by the parts that only it has.
    ({"num_nextn_predict_layers": 1}, ("mlp.gate_proj.weight",)),
    ({}, ("eh_proj.weight", "enorm.weight", "mlp.experts.0.up_proj.weight")),
    ({}, ("shared_head.norm.weight", "self_attn.indexer.wk.weight")),
  )
  def test_mtp_layers(self, changes, parts):
    _, params = checkpoints_toy.save(self.folder)
    checkpoints_toy.edit_config(self.folder, **changes)
    checkpoints_toy.edit_tensors(
      self.folder,
      lambda tensors: tensors.update(
        {f"model.layers.4.{part}": np.zeros(3, np.int32) for part in parts}
      ),
    )
    with self.assertLogs("absl", "INFO") as logs:
      _, found = checkpoints_toy.load(self.folder)
    self.assertIn("multi-token-prediction layers [4]", "".join(logs.output))
    checkpoints_toy.assert_bits_equal(self, params, found)

  def test_other_layers_beyond_the_last_are_not_mtp(self):
    checkpoints_toy.save(self.folder)
    checkpoints_toy.edit_config(
      self.folder,
      num_hidden_layers=3,
      indexer_types=["full"] * 3,
      mlp_layer_types=...,
    )
    with self.assertRaisesRegex(ValueError, r"unexpected tensors \(\d+\):"):
      checkpoints_toy.load(self.folder)

  def test_a_schedule_drops_indexers(self):
    config, params = checkpoints_toy.save(self.folder)
    schedule = ic.ReuseSchedule.from_pattern("FSSF")
    with self.assertLogs("absl", "INFO") as logs:
      found_config, found = checkpoints_toy.load(self.folder, schedule=schedule)
    self.assertIn("Dropped the indexers of layers [1, 2]", logs.output[-1])
    self.assertEqual(found_config, config.replace(schedule=schedule))
    for layer in (1, 2):
      del params[f"layers_{layer}"]["self_attn"]["indexer"]
    checkpoints_toy.assert_bits_equal(self, params, found)

  def test_a_schedule_that_needs_absent_indexers(self):
    checkpoints_toy.save(self.folder, "FSSF")
    with self.assertRaises(checkpoints.CheckpointError) as error:
      checkpoints_toy.load(self.folder, schedule=toy.config("FFSF").schedule)
    message = str(error.exception)
    self.assertIn(
      "indexers of layers 1: full under the schedule 'FFSF'", message
    )
    self.assertIn("its own schedule is 'FSSF'", message)
    self.assertNotIn("missing tensors", message)
    with self.assertRaisesRegex(ValueError, "indexers of layers 1, 2: full"):
      checkpoints_toy.load(self.folder, schedule=toy.config().schedule)
    # A subset of its full layers is fine.
    config, _ = checkpoints_toy.load(
      self.folder, schedule=toy.config("FSSS").schedule
    )
    self.assertEqual(config.schedule.pattern, "FSSS")

  def test_a_schedule_of_another_length(self):
    checkpoints_toy.save(self.folder)
    with self.assertRaisesRegex(ValueError, "got 2 entries"):
      checkpoints_toy.load(
        self.folder, schedule=ic.ReuseSchedule.from_pattern("FS")
      )


class FaultsTest(CheckpointsTest):
  def test_are_listed_together(self):
    checkpoints_toy.save(self.folder)

    def edit(tensors):
      del tensors["model.norm.weight"]
      del tensors[LAYER + "self_attn.indexer.wk.weight"]
      tensors["model.extra"] = np.zeros((2, 3), np.float32)
      tensors["lm_head.weight"] = tensors["lm_head.weight"].T
      tensors["model.embed_tokens.weight"] = np.zeros((64, 32), np.float16)

    checkpoints_toy.edit_tensors(self.folder, edit)
    with self.assertRaises(checkpoints.CheckpointError) as error:
      checkpoints_toy.load(self.folder)
    message = str(error.exception)
    for part in (
      "missing tensors (2):\n",
      "'model.norm.weight': expected shape (32,)",
      "indexer.wk.weight': expected shape (16, 32)",
      "unexpected tensors (1):\n  'model.extra': found shape (2, 3), F32",
      "misshapen tensors (1):\n"
      "  'lm_head.weight': expected shape (64, 32), found (32, 64)",
      "tensors of a wrong dtype (1):\n  'model.embed_tokens.weight': expected"
      " one of ['BF16', 'F32', 'F8_E4M3'], found F16",
    ):
      self.assertIn(part, message)

  def test_a_long_list_is_cut(self):
    checkpoints_toy.save(self.folder)
    checkpoints_toy.edit_config(self.folder, hidden_size=48)
    with self.assertRaisesRegex(ValueError, r"\n  \.\.\. and \d+ more"):
      checkpoints_toy.load(self.folder)

  @parameterized.parameters(jnp.float16, jnp.int32, "bfloat17")
  def test_dtype(self, dtype):
    checkpoints_toy.save(self.folder)
    with self.assertRaisesRegex(ValueError, "`dtype` must be float32 or bfl"):
      checkpoints_toy.load(self.folder, dtype)


class PlacementTest(CheckpointsTest):
  def test_shardings(self):
    _, params = checkpoints_toy.save(self.folder)
    mesh = jax.make_mesh((1,), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    _, found = checkpoints_toy.load(self.folder, sharding=replicated)
    checkpoints_toy.assert_bits_equal(self, params, found)
    self.assertEqual({x.sharding for x in jax.tree.leaves(found)}, {replicated})
    tree = jax.tree.map(lambda x: split if x.ndim > 2 else replicated, params)
    _, found = checkpoints_toy.load(self.folder, sharding=tree)
    jax.tree.map(lambda x, y: self.assertEqual(x.sharding, y), found, tree)
    checkpoints_toy.assert_bits_equal(self, params, found)

  def test_sharding_faults(self):
    checkpoints_toy.save(self.folder)
    with self.assertRaisesRegex(ValueError, "Sharding or a nested dict.*str"):
      checkpoints_toy.load(self.folder, sharding="x")
    with self.assertRaisesRegex(ValueError, "none for .*\n  embed_tokens/emb"):
      checkpoints_toy.load(self.folder, sharding={"norm": {"scale": None}})

  @parameterized.parameters(True, False)
  def test_progress(self, progress):
    checkpoints_toy.save(self.folder)
    with mock.patch("sys.stderr", new_callable=io.StringIO) as stderr:
      checkpoints.load_checkpoint(self.folder, progress=progress)
    self.assertEqual("Loading checkpoint: 100%" in stderr.getvalue(), progress)


class MemoryTest(CheckpointsTest):
  def test_is_the_result_and_one_tensor(self):
    config = toy.config(vocab_size=16384, hidden_size=256)
    checkpoints_toy.save(self.folder, config=config)
    size = (self.folder / "model.safetensors").stat().st_size
    largest = 16384 * 256 * 4
    read = []
    original = safetensors_files.read_rows

    def read_rows(*args):
      result = original(*args)
      read.append(result.nbytes)
      return result

    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    with mock.patch.object(safetensors_files, "read_rows", read_rows):
      _, params = checkpoints_toy.load(self.folder)
    peak = tracemalloc.get_traced_memory()[1]
    self.assertEqual(max(read), largest)
    # Every byte once, but for the header.
    self.assertBetween(sum(read), 0.99 * size, size)
    # The result, a parameter on its way, a tensor; and 4 MB for the rest.
    self.assertLess(peak, size + 2 * largest + 4e6)
    leaves = traverse_util.flatten_dict(params)
    self.assertLess(sum(leaf.nbytes for leaf in leaves.values()), size)


if __name__ == "__main__":
  absltest.main()
