# SPDX-License-Identifier: Apache-2.0
"""A dilation pattern as a text table."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ic_conv.pattern import DilationPattern, LayerPattern

_HEADER = f"{'layer':<28} {'units':>6} {'plain':>6} {'dy':>5} {'dx':>5} {'window':>11}  most frequent"


def summarise(pattern: DilationPattern) -> str:
    """Units, share of plain ones, mean dilation, mean window (pixels), most frequent dilations."""
    layers = [(layer.name or f"layer {index}", layer) for index, layer in enumerate(pattern.layers)]
    title = f"{len(layers)} layers, kernel {pattern.kernel}, base kernel {pattern.base_kernel}"
    lines = [title, _HEADER]
    for stage, members in groupby(layers, key=lambda item: stage_of(item[0])):
        group = list(members)
        lines += [_row(name, [layer], pattern.base_kernel) for name, layer in group]
        if len(group) < len(layers):
            lines.append(_row(f"= {stage}", [layer for _, layer in group], pattern.base_kernel))
    lines.append(_row("= network", list(pattern.layers), pattern.base_kernel))
    return "\n".join(lines)


def stage_of(name: str) -> str:
    """The part of a layer's name that stays the same within a stage: ``layer1.0.conv2`` -> ``layer1``."""
    return name.split(".")[0] if "." in name else "network"


def _row(name: str, layers: list[LayerPattern], base_kernel: int) -> str:
    units = sum(layer.units for layer in layers)
    counts: dict[tuple[int, int], int] = {}
    for layer in layers:
        for dilation, count in layer.branches:
            counts[dilation] = counts.get(dilation, 0) + count
    dy, dx = (sum(d[axis] * count for d, count in counts.items()) / units for axis in (0, 1))
    window = f"{dy * (base_kernel - 1) + 1:.1f}x{dx * (base_kernel - 1) + 1:.1f}"
    plain = counts.get((1, 1), 0) / units
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
    frequent = "  ".join(f"({d[0]},{d[1]}) {count / units:.0%}" for d, count in top)
    return f"{name:<28} {units:>6} {plain:>6.0%} {dy:>5.2f} {dx:>5.2f} {window:>11}  {frequent}"
