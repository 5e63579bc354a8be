# SPDX-License-Identifier: Apache-2.0
"""The front of a study: a table, a picture, and a pattern file for each of its members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ic_conv._files import atomic_path, write_text
from search.report.figure import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from search.strategies.pareto import FrontMember


def front_table(front: Sequence[FrontMember], chosen: FrontMember) -> str:
    """A Markdown table by ascending error; the chosen member is marked."""
    score = any(member.score is not None for member in front)
    lines = [
        "| trial | error, share of plain | latency, ms |" + " score |" * score + " branches | |",
        "|---|---|---|" + "---|" * score + "---|---|",
    ]
    for member in front:
        branches = sum(len(layer.branches) for layer in member.pattern.layers)
        cells = [str(member.trial), f"{member.error:.4f}", f"{member.latency_ms:.2f}"]
        cells += [] if member.score is None else [f"{member.score:.2f}"]
        cells += [str(branches), "chosen" if member.trial == chosen.trial else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_front(
    front: Sequence[FrontMember], chosen: FrontMember, folder: Path, meta: dict[str, Any]
) -> None:
    """Writes front.md, front.png and trial_N.json with its meta file for each member.

    Args:
        chosen: the member that is marked.
        folder: made if missing; pattern files of an earlier front in it are removed.
        meta: provenance that goes into each meta file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    current = {f"trial_{member.trial}" for member in front}
    for path in folder.glob("trial_*.json"):
        if path.name.partition(".")[0] not in current:
            path.unlink()
    for member in front:
        pattern = replace(member.pattern, meta=meta | dict(member.pattern.meta))
        pattern.save(folder / f"trial_{member.trial}.json")
    write_text(folder / "front.md", front_table(front, chosen) + "\n")
    draw_front(front, chosen, folder / "front.png")


def draw_front(front: Sequence[FrontMember], chosen: FrontMember, path: Path) -> None:
    """Draws error against latency; where there is a score, it stands beside each point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    by_latency = sorted(front, key=lambda member: member.latency_ms)
    latencies, errors = ([getattr(m, key) for m in by_latency] for key in ("latency_ms", "error"))
    line = "o" if any(member.score is not None for member in front) else "o-"
    axis.plot(latencies, errors, line, color=BLUE, label="front")
    axis.plot(chosen.latency_ms, chosen.error, "o", color=ORANGE, markersize=10, label="chosen")
    for member in front:
        label = str(member.trial) if member.score is None else f"{member.trial}: {member.score:.1f}"
        place = (member.latency_ms, member.error)
        axis.annotate(label, place, xytext=(5, 5), textcoords="offset points", fontsize=8, color=GREY)
    axis.set_xlabel("latency, ms")
    axis.set_ylabel("representation error, share of plain dilations'")
    axis.set_title(f"{len(front)} patterns on the front", loc="left", fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
