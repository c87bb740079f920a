# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains a byte-level DSA language model on text, on CPU, GPU or TPU.

Claim: in the published order (dense attention; indexers alone on KL; sparse
attention) a model of a few million parameters learns to find, under sparse
attention, facts that lie many times `index_topk` away.

  python -m experiments.train --dtype=bfloat16 --output_dir=runs/small

Expected: a folder with `checkpoint/` (Hugging Face format, read by
`indexcache_jax.load_checkpoint`), `state/` (orbax; the same command resumes
from it) and `tensorboard/`. `results/embedded_model/README.md` holds the
command, device, run time and losses of the embedded model.
"""

import dataclasses
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorboardX
import tqdm
from absl import flags, logging

import indexcache_jax as ic
from experiments import common, inputs
from indexcache_jax import text, training

_PRESET = flags.DEFINE_enum(
  "preset", "small", sorted(ic.PRESETS), "Dimensions of the model."
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "runs/train", "Where checkpoint, state and logs go."
)
_SCHEDULE = flags.DEFINE_string(
  "schedule",
  "full",
  "To train under: a pattern such as FSSF, full, uniform:4, freq:4, freq:4:3.",
)
_MULTI_LAYER = flags.DEFINE_bool(
  "multi_layer", True, "Distil every served layer into its full layer."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Sequences of a step.")
_DENSE_STEPS = flags.DEFINE_integer("dense_steps", 2000, "Stage 0.")
_WARMUP_STEPS = flags.DEFINE_integer("warmup_steps", 150, "Stage 1.")
_SPARSE_STEPS = flags.DEFINE_integer("sparse_steps", 250, "Stage 2.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "Its peak.")
_INDEXER_LEARNING_RATE = flags.DEFINE_float(
  "indexer_learning_rate", 5e-3, "Of the warm-up."
)
_NEEDLE_FRACTION = flags.DEFINE_float(
  "needle_fraction", 0.25, "Share of sequences with hidden facts."
)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 200, "Steps between saves.")


def main(argv):
  """Trains, saves, and prints where the checkpoint is."""
  common.reject_arguments(argv)
  # orbax tells every save in twenty lines; the progress bar says enough.
  logging.set_verbosity(logging.WARNING)
  config, train = _configs()
  training_files, _ = text.split_files(inputs.text_files())
  tokens = text.load_tokens(training_files, text.encode_bytes)
  print(
    f"{len(training_files)} files, {len(tokens):,} tokens,"
    f" {common.count_parameters(config):,} parameters"
  )
  output_dir = pathlib.Path(_OUTPUT_DIR.value).absolute()
  state = run(config, train, tokens, output_dir)
  path = output_dir / "checkpoint"
  ic.save_checkpoint(
    path, config, state.params, dtype=jnp.bfloat16, overwrite=True
  )
  print(f"Checkpoint: {path}")


def run(config, train, tokens, output_dir):
  """Trains from the last saved step to the end; returns the final state."""
  _check_same_run(output_dir, config, train, tokens)
  shard_batch, state = _place(training.init_state(config, train))
  with (
    ocp.CheckpointManager(
      output_dir / "state", options=ocp.CheckpointManagerOptions(max_to_keep=1)
    ) as manager,
    tensorboardX.SummaryWriter(str(output_dir / "tensorboard")) as writer,
  ):
    if manager.latest_step() is not None:
      state = manager.restore(
        manager.latest_step(), args=ocp.args.StandardRestore(state)
      )
    first = int(state.step)
    bar = tqdm.tqdm(initial=first, total=train.num_steps, unit="step")
    for step in range(first, train.num_steps):
      stage = train.stage(step)
      batch = shard_batch(training.training_batch(tokens, train, step))
      state, metrics = training.train_step(config, train, stage, state, batch)
      training.check_finite(step, metrics, state)
      _log(writer, bar, step, stage, metrics)
      if (step + 1) % _SAVE_EVERY.value == 0 or step + 1 == train.num_steps:
        manager.save(step + 1, args=ocp.args.StandardSave(state))
    bar.close()
  return state


def _configs():
  config = ic.PRESETS[_PRESET.value]()
  context, batch_size = inputs.CONTEXT.value or 1024, _BATCH_SIZE.value
  steps = (_DENSE_STEPS.value, _WARMUP_STEPS.value, _SPARSE_STEPS.value)
  if inputs.SMOKE.value:
    config = ic.PRESETS["tiny"]().replace(vocab_size=256, num_hidden_layers=2)
    context, batch_size, steps = 192, 2, (2, 2, 2)
  changes = {
    "dtype": jnp.dtype(inputs.DTYPE.value),
    "max_position_embeddings": max(context, config.max_position_embeddings),
    "schedule": ic.ReuseSchedule.parse(
      _SCHEDULE.value, config.num_hidden_layers
    ),
  }
  train = training.TrainConfig(
    context=context,
    batch_size=batch_size,
    dense_steps=steps[0],
    warmup_steps=steps[1],
    sparse_steps=steps[2],
    learning_rate=_LEARNING_RATE.value,
    indexer_learning_rate=_INDEXER_LEARNING_RATE.value,
    multi_layer=_MULTI_LAYER.value,
    needle_fraction=_NEEDLE_FRACTION.value,
    num_needles=2 if inputs.SMOKE.value else 4,
    seed=inputs.SEED.value,
  )
  return config.replace(**changes), train


def _place(state):
  """Replicates the state and splits batches over all devices."""
  mesh = jax.sharding.Mesh(jax.devices(), ("data",))
  spec = jax.sharding.PartitionSpec
  replicated = jax.sharding.NamedSharding(mesh, spec())
  split = jax.sharding.NamedSharding(mesh, spec("data"))
  return (
    lambda batch: jax.device_put(batch, split),
    jax.device_put(state, replicated),
  )


def _check_same_run(output_dir, config, train, tokens):
  """Refuses to resume a run of other settings; records those of a new one."""
  settings = {
    field.name: str(getattr(record, field.name))
    for record in (config, train)
    for field in dataclasses.fields(record)
  }
  checksum = zlib.crc32(np.ascontiguousarray(tokens))
  settings["text"] = f"{len(tokens)} tokens, CRC-32 {checksum:08x}"
  path = output_dir / "settings.json"
  if path.exists():
    recorded = json.loads(path.read_text(encoding="utf-8"))
    differing = [
      f"{name}={recorded.get(name)} there and {settings.get(name)} here"
      for name in settings | recorded
      if settings.get(name) != recorded.get(name)
    ]
    if differing:
      raise ValueError(
        f"--output_dir must be of the same run or new: got {output_dir}, whose"
        f" settings.json has {'; '.join(differing)}. Use another folder, or"
        " remove this one to start anew."
      )
  common.write_text(path, json.dumps(settings, indent=1))


def _log(writer, bar, step, stage, metrics):
  for name, value in metrics._asdict().items():
    writer.add_scalar(f"{stage}/{name}", float(value), step)
  bar.update()
  bar.set_postfix_str(
    f"{stage} loss {metrics.loss:.4f} kl {metrics.index_kl:.4f}"
  )


if __name__ == "__main__":
  common.run(main)
