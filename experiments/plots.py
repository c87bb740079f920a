# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The figures of the scripts, as PNG files."""

import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import figure as figure_lib
from matplotlib import ticker

# Figures here never enter pyplot, which would keep them and want a display.

_MARKERS = "osD^vP*X"
# More layers than this leave no room for a number in each cell.
_MAX_NUMBERED_LAYERS = 16


def heatmap(
  path: pathlib.Path,
  matrix: Float[np.ndarray, "L L"],
  *,
  title: str,
  colour_label: str,
) -> None:
  """Draws a matrix of `analysis`, its values between 0 and 1.

  Args:
    path: of the PNG.
    matrix: the layer that reads in its row, the one that selects in its column.
    title: above it.
    colour_label: what a value is.
  """
  num_layers = len(matrix)
  figure = figure_lib.Figure(figsize=(7.2, 6), layout="constrained")
  axes = figure.add_subplot()
  # One scale for all such figures, so that they compare.
  image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(
      ticker.MaxNLocator(_MAX_NUMBERED_LAYERS, integer=True)
    )
  axes.set_xlabel("layer whose indices are used")
  axes.set_ylabel("layer that attends")
  axes.set_title(title)
  if num_layers <= _MAX_NUMBERED_LAYERS:
    for (row, column), value in np.ndenumerate(matrix):
      # Viridis is dark up to about 0.6.
      colour = "white" if value < 0.6 else "black"
      axes.text(
        column,
        row,
        f"{value:.2f}",
        ha="center",
        va="center",
        color=colour,
        fontsize=7.5,
      )
  figure.colorbar(image, ax=axes, label=colour_label)
  _write(path, figure)


def losses_by_retention(
  path: pathlib.Path,
  rows: Sequence[Mapping[str, object]],
  baseline_loss: float,
) -> None:
  """Draws the held-out loss of each method over the share of indexers kept.

  Args:
    path: of the PNG.
    rows: one a schedule, with `method` (a name), `share` (full layers over
      all) and `loss` (nats a token).
    baseline_loss: of the all-full schedule.
  """
  figure = figure_lib.Figure(figsize=(8, 5), layout="constrained")
  axes = figure.add_subplot()
  methods = dict.fromkeys(row["method"] for row in rows)
  for method, marker in zip(methods, itertools.cycle(_MARKERS), strict=False):
    points = sorted(
      (row["share"], row["loss"]) for row in rows if row["method"] == method
    )
    axes.plot(
      *zip(*points, strict=True), marker=marker, label=method, alpha=0.85
    )
  axes.axhline(
    baseline_loss, color="black", linestyle="--", linewidth=1, label="all full"
  )
  axes.set_xscale("log", base=2)
  axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1], ["1/8", "1/4", "1/2", "1"])
  axes.minorticks_off()
  axes.set_xlabel("share of indexers kept")
  axes.set_ylabel("held-out loss (nats a token)")
  axes.set_title("Held-out loss by share of indexers kept")
  axes.grid(alpha=0.3)
  axes.legend()
  _write(path, figure)


def _write(path, figure):
  """Writes a whole PNG or, if interrupted, nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  figure.savefig(temporary, format="png", dpi=150)
  temporary.replace(path)
