# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A search's progress bar, and its state on disk after every evaluation."""

import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np
import tqdm
from jaxtyping import Int32

import indexcache_jax as ic
from experiments import common


class SearchProgress:
  """Saves and shows the searches of one sweep, by the method's name."""

  def __init__(self, path: pathlib.Path, fingerprint: str):
    """Reads the states of an interrupted sweep, if there is one.

    Args:
      path: of the state file.
      fingerprint: of all that the losses depend on.

    Raises:
      ValueError: if the file is of another sweep, or was damaged.
    """
    self._path = path
    self._fingerprint = fingerprint
    self._states: dict[str, str] = {}
    self._bar: tqdm.tqdm | None = None
    if path.exists():
      self._states = self._read()

  def state(self, method: str) -> ic.SearchState | None:
    """Where the method's search was interrupted; None: it was not begun."""
    saved = self._states.get(method)
    return None if saved is None else ic.SearchState.from_json(saved)

  def callback(self, method: str) -> Callable[[ic.SearchState], None]:
    """Returns an `on_evaluation` that saves and shows."""
    self.close_bar()

    def on_evaluation(state):
      self._states[method] = state.to_json()
      common.write_text(
        self._path,
        json.dumps({"fingerprint": self._fingerprint, "states": self._states}),
      )
      if self._bar is None:
        self._bar = tqdm.tqdm(
          desc=f"  {method}", initial=state.evaluations - 1, unit="loss"
        )
      self._bar.total = state.evaluations_bound
      self._bar.update(state.evaluations - self._bar.n)

    return on_evaluation

  def remove(self) -> None:
    """Deletes the state of a sweep that is over."""
    self.close_bar()
    self._path.unlink(missing_ok=True)

  def close_bar(self) -> None:
    """Ends the bar of a search that is over."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None

  def _read(self):
    way_out = "Remove it to start anew, or choose another --output_dir."
    try:
      saved = json.loads(self._path.read_text())
      fingerprint, states = saved["fingerprint"], saved["states"]
      for state in states.values():
        ic.SearchState.from_json(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f"The state of a search must be whole: {self._path} is not ({error})."
        f" {way_out}"
      ) from error
    if fingerprint != self._fingerprint:
      raise ValueError(
        "An interrupted sweep can go on only with the same checkpoint and"
        f" calibration text: {self._path} is of others. {way_out}"
      )
    return states


def fingerprint(
  config: ic.SparseTransformerConfig,
  batches: Int32[np.ndarray, "M B T"],
  loss_fn: ic.LayerwiseLoss,
) -> str:
  """Hash of what a search's losses depend on.

  The loss of all full, to its last bit, stands for the parameters. It leaves
  `loss_fn` with all full for its base, from which a search begins.
  """
  all_full = ic.ReuseSchedule.all_full(config.num_hidden_layers)
  loss_fn.set_base(all_full)
  digest = hashlib.sha256(repr(config).encode())
  digest.update(np.ascontiguousarray(batches).tobytes())
  digest.update(loss_fn(all_full).hex().encode())
  return digest.hexdigest()
