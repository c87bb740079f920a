# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""One training run on disk: resumes, saves, logs, stops in time."""

import dataclasses
import json
import math
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorboardX
import tqdm

import indexcache_jax as ic
from experiments import common
from indexcache_jax import training


def deadline_after(minutes: float) -> float:
  """Returns the time, by `time.monotonic`, at which a run is to end."""
  if not minutes > 0:
    raise ValueError(f"--max_minutes must be above 0: got {minutes:g}.")
  return time.monotonic() + 60 * minutes


def train_to_checkpoint(
  config, train, tokens, output_dir, *, origin=None, **kwargs
) -> bool:
  """Trains and writes `checkpoint/`; returns whether it got that far.

  Arguments are those of `run`. A finished run is left as it is.
  """
  path = output_dir / "checkpoint"
  if path.exists():
    _check_same_run(output_dir, config, train, tokens, origin)
    print(f"Checkpoint: {path}, which was there.")
    return True
  state = run(config, train, tokens, output_dir, origin=origin, **kwargs)
  step = int(state.step)
  if step < train.num_steps:
    print(
      f"Saved step {step} of {train.num_steps}, the time being up: the same"
      " command goes on from there."
    )
    return False
  ic.save_checkpoint(path, config, state.params, dtype=jnp.bfloat16)
  print(f"Checkpoint: {path}")
  return True


def compile_stages(config, train) -> None:
  """Compiles the programs of a run, which another process then finds.

  They go into JAX's compilation cache, and nothing else is left of it.

  Raises:
    ValueError: there is no such cache.
  """
  common.require_compilation_cache("Compiling alone")
  state = jax.eval_shape(lambda: training.init_state(config, train))
  programs = dict.fromkeys(
    (train.stage(step), train.batch_shape(step))
    for step in range(train.num_steps)
  )
  mesh = _mesh(train)
  for stage, shape in programs:
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    training.train_step.lower(
      config, train, stage, state, tokens, mesh=mesh
    ).compile()


def run(
  config,
  train,
  tokens,
  output_dir,
  *,
  params=None,
  origin=None,
  save_every=200,
  deadline=math.inf,
):
  """Trains from the last saved step to the end; returns the final state.

  Args:
    config: of the model.
    train: settings.
    tokens: of text.
    output_dir: of state and logs.
    params: to begin with; None: drawn.
    origin: what they are, for `settings.json`.
    save_every: steps between saves.
    deadline: by `time.monotonic`; the step during which it passes is the last
      one, and saved.
  """
  _check_same_run(output_dir, config, train, tokens, origin)
  batch_of, state, mesh = _place(
    tokens, train, training.init_state(config, train, params)
  )
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
    with _Log(output_dir / "log.jsonl", writer, first, train.num_steps) as log:
      batch = batch_of(first) if first < train.num_steps else None
      for step in range(first, train.num_steps):
        stage = train.stage(step)
        state, metrics = training.train_step(
          config, train, stage, state, batch, mesh=mesh
        )
        if step + 1 < train.num_steps:
          # Made while the device works on this step.
          batch = batch_of(step + 1)
        training.check_finite(step, metrics)
        log.add(step, stage, metrics)
        is_last = step + 1 == train.num_steps or time.monotonic() > deadline
        if is_last or (step + 1) % save_every == 0:
          manager.save(step + 1, args=ocp.args.StandardSave(state))
        if is_last:
          break
  return state


def _place(tokens, train, state):
  """Returns how to place a step's batch, the state, and the mesh.

  The state is on all devices, and each has sequences of its own.
  """
  mesh = _mesh(train)

  def batch(step):
    return training.training_batch(tokens, train, step)

  if mesh is None:
    return lambda step: jax.device_put(batch(step)), state, None
  spec = jax.sharding.PartitionSpec
  split = jax.sharding.NamedSharding(mesh, spec("data"))
  return (
    lambda step: jax.device_put(batch(step), split),
    jax.device_put(state, jax.sharding.NamedSharding(mesh, spec())),
    mesh,
  )


def _mesh(train):
  """All devices in one axis; None for a single one."""
  devices = jax.devices()
  for field in ("batch_size", "warmup_batch_size"):
    size = getattr(train, field)
    if size is not None and size % (train.accumulation * len(devices)):
      raise ValueError(
        f"--{field} must be a multiple of --accumulation times the devices:"
        f" got {size} for {train.accumulation} x {len(devices)}."
      )
  if len(devices) == 1:
    return None
  return jax.sharding.Mesh(
    np.asarray(devices),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def _check_same_run(output_dir, config, train, tokens, origin):
  """Refuses to resume a run of other settings; records those of a new one."""
  settings = {
    field.name: str(getattr(record, field.name))
    for record in (config, train)
    for field in dataclasses.fields(record)
  }
  checksum = zlib.crc32(np.ascontiguousarray(tokens))
  settings["text"] = f"{len(tokens)} tokens, CRC-32 {checksum:08x}"
  settings["origin"] = str(origin)
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


class _Log:
  """A bar, a line of `log.jsonl` and TensorBoard's scalars a step."""

  def __init__(self, path, writer, first, num_steps):
    """Drops the lines of steps that will be taken again."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < first]
    common.write_text(path, "".join(f"{line}\n" for line in kept))
    self._file = path.open("a", encoding="utf-8")
    self._writer = writer
    self._bar = tqdm.tqdm(initial=first, total=num_steps, unit="step")
    self._time = time.monotonic()

  def add(self, step, stage, metrics):
    """Records a step that is over."""
    scalars = {
      name: float(getattr(metrics, name))
      for name in ("loss", "index_kl", "grad_norm")
    }
    now = time.monotonic()
    record = {"step": step, "stage": stage, **scalars}
    record["seconds"] = round(now - self._time, 4)
    self._time = now
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    for name, value in scalars.items():
      self._writer.add_scalar(f"{stage}/{name}", value, step)
    self._bar.update()
    self._bar.set_postfix_str(
      f"{stage} loss {scalars['loss']:.4f} kl {scalars['index_kl']:.4f}"
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()
    self._file.close()
