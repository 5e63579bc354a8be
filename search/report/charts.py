# SPDX-License-Identifier: Apache-2.0
"""Charts as data URIs for the HTML report; their text follows light and dark mode."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ic_conv.pattern import DilationPattern
from search.report.figure import (
    BLUE,
    GREY,
    ORANGE,
    draw_mean_dilation,
    draw_receptive_field,
    finish_layers,
)
from search.report.peers import Peer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#00fe01"  # stands for the text colour until the SVG is written
_COLOURS = {_INK: ("#1d232c", "#e4e7ec"), BLUE: (BLUE, "#79b0ee"), ORANGE: (ORANGE, "#f0a06a")}  # light, dark
_LOOKS = {  # by peer: colour, marker, line
    "found": (BLUE, "o", "-"),
    "found, shuffled": (BLUE, "", ":"),
    "plain": (GREY, "", "--"),
    "hand": ("#2a9d6f", "^", "-"),
    "uniform": (ORANGE, "s", "-"),
    "random": ("#b45fb0", "x", "-"),
}


def chart(draw: Callable[[Axes], None]) -> str:
    """What `draw` puts on an axis, as an SVG so small, 4 x 2.7 inches, that a phone shows its text well."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inked: Any = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "report", **dict.fromkeys(inked, _INK)}):
        figure = Figure(figsize=(4, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _data_uri(_themed(buffer.getvalue()).encode(), "image/svg+xml")


def _themed(svg: str) -> str:
    """The SVG with variables for colours, which have other values in dark mode."""
    svg = svg[svg.index("<svg") :]  # without the doctype
    for index, colour in enumerate(_COLOURS):
        svg = svg.replace(colour, f"var(--c{index})")
    light, dark = (
        ";".join(f"--c{index}:{pair[mode]}" for index, pair in enumerate(_COLOURS.values()))
        for mode in (0, 1)
    )
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return svg.replace("<defs>", f"{style}<defs>", 1)


def gradient_picture(cells: Sequence[Sequence[int]]) -> str:
    """A map of gradients as a PNG; the root makes small values visible."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    root = np.sqrt(np.asarray(cells, dtype=np.float64) / 1000)
    imsave(buffer, root, format="png", cmap=colormaps["magma"], vmin=0, vmax=1)
    return _data_uri(buffer.getvalue(), "image/png")


def draw_dilation(axis: Axes, pattern: DilationPattern) -> None:
    """Mean dilation of each layer."""
    draw_mean_dilation(axis, pattern)
    _make_room(axis, pattern)


def draw_theory(axis: Axes, pattern: DilationPattern) -> None:
    """Theoretical receptive field after each layer."""
    draw_receptive_field(axis, pattern)
    _make_room(axis, pattern)


def draw_errors(axis: Axes, pattern: DilationPattern, peers: Sequence[Peer]) -> None:
    """Criterion error of each layer, a line per pattern."""
    for peer in peers:
        colour, marker, line = _LOOKS.get(peer.name, (None, ".", "-."))
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "markersize": 3.5}
        axis.plot(peer.errors, **look, linewidth=2 if peer.name == "found" else 1.2, label=peer.name)
    finish_layers(axis, pattern)
    _make_room(axis, pattern)


def draw_curve(axis: Axes, curve: Mapping[str, Sequence[float]]) -> None:
    """Loss by step, faint, and its running mean over a twentieth of the training."""
    step, loss = np.asarray(curve["step"]), np.asarray(curve["loss"])
    width = max(1, len(loss) // 20)
    kernel = np.ones(width) / width
    mean = np.convolve(loss, kernel, mode="valid")
    axis.plot(step, loss, color=BLUE, alpha=0.35, linewidth=0.8)
    axis.plot(step[width // 2 : width // 2 + len(mean)], mean, color=BLUE, linewidth=2)
    axis.set_xlabel("step", fontsize=9)
    _plain_axis(axis)


def draw_learning_rate(axis: Axes, curve: Mapping[str, Sequence[float]]) -> None:
    """Learning rate by step."""
    axis.plot(curve["step"], curve["lr"], color=ORANGE, linewidth=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step", fontsize=9)
    _plain_axis(axis)


def _make_room(axis: Axes, pattern: DilationPattern) -> None:
    """Legend above instead of the title, which the page has; smaller names for narrow stages."""
    axis.set_title("")
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False, borderaxespad=0.2
    )
    axis.tick_params(axis="x", labelsize=8 if len(pattern.layers) < 25 else 6.5)


def _plain_axis(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
