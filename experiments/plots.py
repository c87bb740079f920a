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
  _retention_axis(axes)
  axes.set_ylabel("held-out loss (nats a token)")
  axes.set_title("Held-out loss by share of indexers kept")
  axes.grid(alpha=0.3)
  axes.legend()
  _write(path, figure)


def inference(
  path: pathlib.Path,
  times: Mapping[str, Mapping[tuple[str, str, int], tuple[float, int]]],
) -> None:
  """Draws prefill seconds and milliseconds a token over the context.

  A colour a schedule, a line style a dtype of the index keys. A schedule that
  was timed at one context alone is drawn only where no other has more.

  Args:
    path: of the PNG.
    times: by phase ("prefill", "decode"); then by dtype of the index keys,
      schedule and context: time and number of full layers.
  """
  figure = figure_lib.Figure(figsize=(11, 4.5), layout="constrained")
  labels = {"prefill": "seconds to first token", "decode": "ms a token"}
  for place, (phase, label) in enumerate(labels.items(), start=1):
    axes = figure.add_subplot(1, 2, place)
    _inference_curves(axes, times.get(phase, {}))
    axes.set_xlabel("context (thousand tokens)")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
  _write(path, figure)


def _inference_curves(axes, found):
  """Draws a phase's series, most indexers first."""
  series = {}
  for (keys, name, context), (taken, num_full) in found.items():
    points = series.setdefault((-num_full, name, keys), [])
    points.append((context / 1000, taken))
  most = max(map(len, series.values()), default=0)
  series = {
    one: sorted(points)
    for one, points in sorted(series.items())
    if len(points) > 1 or most == 1
  }
  names = list(dict.fromkeys(name for _, name, _ in series))
  dtypes = sorted({keys for *_, keys in series})
  for (_, name, keys), points in series.items():
    rank = names.index(name)
    axes.plot(
      *zip(*points, strict=True),
      color=f"C{rank}",
      marker=_MARKERS[rank % len(_MARKERS)],
      linestyle=("-", "--", ":")[dtypes.index(keys) % 3],
      label=f"{name}, {keys}",
      alpha=0.85,
    )
  if series:
    axes.legend(title="schedule, index keys")


def curves_by_retention(
  path: pathlib.Path,
  curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
  *,
  label: str,
) -> None:
  """Draws a curve a rule over the share of indexers kept, and a dot a seed.

  Args:
    path: of the PNG.
    curves: by rule, points of (share, value of each seed).
    label: what is drawn.
  """
  figure = figure_lib.Figure(figsize=(8, 5), layout="constrained")
  axes = figure.add_subplot()
  for rank, (rule, points) in enumerate(curves.items()):
    shares, values = zip(*sorted(points), strict=True)
    axes.plot(
      shares,
      list(map(np.mean, values)),
      color=f"C{rank}",
      label=rule,
      alpha=0.7,
    )
    # Rules stand side by side where their dots would hide each other.
    shift = 1 + 0.04 * (rank - (len(curves) - 1) / 2)
    for share, seeds in zip(shares, values, strict=True):
      axes.plot(
        [share * (shift if share < 1 else 1)] * len(seeds),
        seeds,
        color=f"C{rank}",
        marker=_MARKERS[rank % len(_MARKERS)],
        linestyle="none",
        markersize=5,
      )
  _retention_axis(axes)
  axes.set_ylabel(label)
  axes.set_title("mean of the seeds, a dot each")
  axes.grid(alpha=0.3)
  axes.legend()
  _write(path, figure)


def lines_by_layer(
  path: pathlib.Path, values: Mapping[str, Sequence[float]], *, label: str
) -> None:
  """Draws a line a series over the layers from 1 on.

  Args:
    path: of the PNG.
    values: of each layer but the first, by series.
    label: what is drawn.
  """
  figure = figure_lib.Figure(figsize=(8, 4), layout="constrained")
  axes = figure.add_subplot()
  for (name, series), marker in zip(
    values.items(), itertools.cycle(_MARKERS), strict=False
  ):
    layers = range(1, len(series) + 1)
    axes.plot(layers, series, marker=marker, label=name, alpha=0.85)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.set_xlabel("layer")
  axes.set_ylabel(label)
  axes.grid(alpha=0.3)
  axes.legend()
  _write(path, figure)


def bars(
  path: pathlib.Path, values: Mapping[str, Sequence[float]], *, label: str
) -> None:
  """Draws a bar a row, the mean of its seeds, and a dot a seed.

  Args:
    path: of the PNG.
    values: of each seed, by row.
    label: what is drawn.
  """
  figure = figure_lib.Figure(
    figsize=(8, 1 + 0.5 * len(values)), layout="constrained"
  )
  axes = figure.add_subplot()
  axes.barh(list(values), list(map(np.mean, values.values())), alpha=0.5)
  for row, seeds in values.items():
    axes.plot(seeds, [row] * len(seeds), "ok", markersize=4)
  axes.invert_yaxis()
  axes.set_xlabel(label)
  axes.set_title("mean of the seeds, a dot each")
  axes.grid(alpha=0.3, axis="x")
  _write(path, figure)


def _retention_axis(axes):
  axes.set_xscale("log", base=2)
  axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1], ["1/8", "1/4", "1/2", "1"])
  axes.minorticks_off()
  axes.set_xlabel("share of indexers kept")


def _write(path, figure):
  """Writes a whole PNG or, if interrupted, nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  figure.savefig(temporary, format="png", dpi=150)
  temporary.replace(path)
