# SPDX-License-Identifier: Apache-2.0
"""A dilation pattern as a picture: a heat map per layer, mean dilation and receptive field per stage."""

from __future__ import annotations

import os
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ic_conv._files import atomic_path
from ic_conv._pattern_summary import stage_of
from ic_conv.pattern import DilationPattern, LayerPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLUMNS = 8  # heat maps in a row; a longer stage goes on in the next row
BLUE, ORANGE, GREY = "#2f6db3", "#e07b39", "#9aa0a6"


def draw_pattern(pattern: DilationPattern, path: str | os.PathLike[str], title: str | None = None) -> None:
    """Draws a pattern to a PNG (or whatever the suffix says), in one atomic step.

    Above: for each layer the share of its units that has dilation (dy, dx), darker is more. Below: mean
    dilation of each layer, and the receptive field that the searched layers give, against plain ones; in
    pixels of the image when the pattern's meta knows the layers' strides, else of the layers' own inputs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(pattern)
    height = 0.95 * len(rows) + 3.6
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title or _title(pattern), fontsize=13, fontweight="bold")
    parts: Any = figure.subfigures(2, 1, height_ratios=[0.95 * len(rows) + 0.4, 2.9])
    upper, lower = parts
    _draw_heat_maps(upper, pattern, rows)
    left, right = lower.subplots(1, 2)
    draw_mean_dilation(left, pattern)
    draw_receptive_field(right, pattern)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def share_map(layer: LayerPattern, max_dilation: int) -> NDArray[np.float64]:
    """Share of the layer's units with each dilation: (max_dilation, max_dilation), rows are dy."""
    shares = np.zeros((max_dilation, max_dilation))
    for (dy, dx), count in layer.branches:
        shares[dy - 1, dx - 1] = count / layer.units
    return shares


def receptive_field(pattern: DilationPattern, plain: bool = False) -> NDArray[np.float64]:
    """Mean receptive field after each layer in image pixels, counting the searched layers alone: (layers, 2).

    Each layer adds (window - 1) * stride, vertically and horizontally, with the stride of its input
    relative to the image; strides that the meta does not tell count as 1. `plain` gives the same for
    dilation (1, 1) everywhere.
    """
    strides = pattern.meta.get("layer_stride", {})
    growth = [
        [
            ((pattern.base_kernel if plain else window) - 1) * stride
            for window, stride in zip(
                layer.window(pattern.base_kernel), strides.get(layer.name, (1, 1)), strict=True
            )
        ]
        for layer in pattern.layers
    ]
    return 1 + np.cumsum(np.array(growth, dtype=np.float64), axis=0)


def _title(pattern: DilationPattern) -> str:
    arch = pattern.meta.get("architecture", "dilation pattern")
    return f"{arch}, kernel {pattern.kernel}: {len(pattern.layers)} layers"


def stages(pattern: DilationPattern) -> list[tuple[str, list[int]]]:
    """Name and layer indices of each stage."""
    names = [name or "" for name in pattern.names]
    stages = groupby(range(len(names)), key=lambda index: stage_of(names[index]))
    return [(stage, list(indices)) for stage, indices in stages]


def _rows(pattern: DilationPattern) -> list[tuple[str, list[int]]]:
    """Stages cut into rows of at most COLUMNS heat maps; only a stage's first row has its name."""
    return [
        (stage if start == 0 else "", indices[start : start + COLUMNS])
        for stage, indices in stages(pattern)
        for start in range(0, len(indices), COLUMNS)
    ]


def _draw_heat_maps(figure: SubFigure, pattern: DilationPattern, rows: list[tuple[str, list[int]]]) -> None:
    from matplotlib.colors import PowerNorm

    columns = max(6, *(len(indices) for _, indices in rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    side = pattern.max_dilation
    for row, (stage, indices) in enumerate(rows):
        for column, axis in enumerate(axes[row]):
            if column >= len(indices):
                axis.axis("off")
                continue
            layer = pattern.layers[indices[column]]
            picture = axis.imshow(
                share_map(layer, side),
                cmap="Blues",
                norm=PowerNorm(0.5, 0, 1),
                extent=(0.5, side + 0.5, side + 0.5, 0.5),
            )
            axis.set_title(
                f"{short_name(layer.name, indices[column])}: {layer.plain_share:.0%} plain", fontsize=7, pad=2
            )
            axis.set_xticks([1, side])
            axis.set_yticks([1, side])
            axis.tick_params(labelsize=6, length=0, pad=1)
            if column == 0:
                axis.set_ylabel(stage, fontsize=9, fontweight="bold")
    bar = figure.colorbar(picture, ax=axes, shrink=0.9, aspect=30, pad=0.01, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "5 %", "20 %", "50 %", "100 %"], fontsize=7)
    bar.set_label("share of the layer's units; rows dy, columns dx", fontsize=8)


def short_name(name: str | None, index: int) -> str:
    """``layer3.5.conv2`` within its stage's row: ``5.conv2``."""
    return str(index) if name is None else name.split(".", 1)[-1]


def draw_mean_dilation(axis: Axes, pattern: DilationPattern) -> None:
    """Mean dilation of each layer, vertically and horizontally."""
    means = np.array([layer.mean_dilation for layer in pattern.layers])
    position = np.arange(len(means))
    axis.plot(position, means[:, 0], "o-", color=BLUE, markersize=3.5, label="dy (vertical)")
    axis.plot(position, means[:, 1], "s-", color=ORANGE, markersize=3.5, label="dx (horizontal)")
    axis.axhline(1, color=GREY, linewidth=1, linestyle="--", label="plain")
    axis.set_title("mean dilation of each layer", fontsize=10)
    axis.set_ylim(0.8, max(2.0, means.max() * 1.15))
    finish_layers(axis, pattern)


def draw_receptive_field(axis: Axes, pattern: DilationPattern) -> None:
    """Mean receptive field after each layer, against plain layers."""
    found, plain = receptive_field(pattern), receptive_field(pattern, plain=True)
    position = np.arange(len(found))
    axis.plot(position, found.mean(1), "o-", color=BLUE, markersize=3.5, label="this pattern")
    axis.plot(position, plain.mean(1), color=GREY, linestyle="--", label="plain")
    axis.fill_between(position, plain.mean(1), found.mean(1), color=BLUE, alpha=0.12)
    known = "layer_stride" in pattern.meta
    unit = "pixels of the image" if known else "pixels, strides not known"
    axis.set_title(f"receptive field of the searched layers ({unit})", fontsize=10)
    axis.annotate(
        f"{found.mean(1)[-1] / plain.mean(1)[-1]:.2f} x plain",
        (position[-1], found.mean(1)[-1]),
        xytext=(-8, -2),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=BLUE,
    )
    finish_layers(axis, pattern)


def finish_layers(axis: Axes, pattern: DilationPattern) -> None:
    """Stage names below, thin lines between stages, legend."""
    parts = stages(pattern)
    axis.set_xticks([np.mean(indices) for _, indices in parts], [stage for stage, _ in parts], fontsize=8)
    axis.tick_params(axis="x", length=0)
    axis.tick_params(axis="y", labelsize=8)
    for _, indices in parts[1:]:
        axis.axvline(indices[0] - 0.5, color=GREY, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
