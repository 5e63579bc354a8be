# SPDX-License-Identifier: Apache-2.0
"""What a comparison shows: a Markdown table, and a figure of score against total compute."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import t as student

from search.compare.setting import PLAIN

Runs = Mapping[int, Mapping[str, float]]  # by seed
SCORES = {"mAP": "mAP", "mAP_small": "small", "mAP_medium": "medium", "mAP_large": "large"}
COSTS = {"flops": "total FLOPs", "seconds": "total seconds"}
CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % confidence interval (Student's t); nan for a single value."""
    if len(values) < 2:
        return math.nan
    quantile = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def table(results: Mapping[str, Runs], against: str | None = None, scores: Mapping[str, str] = SCORES) -> str:
    """A Markdown table: means over the seeds and half the width of their 95 % confidence intervals.

    Args:
        results: by method and seed, scores and shares of `run` or `with_cost`.
        against: a method; the others' first scores minus its own, seed by seed, become a column.
        scores: columns and their titles.
    """
    first, title = next(iter(scores.items()))
    base = {cost: _mean(results.get(PLAIN, {}), cost) for cost in COSTS}
    costs = [cost for cost in COSTS if not math.isnan(base[cost])]
    titles = ["method", *scores.values()]
    titles += [] if against is None else [f"{title} against {against}"]
    titles += ["plain channels", *(COSTS[cost] for cost in costs), "seeds"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, runs in results.items():
        cells = [_cell([run[score] for run in runs.values()]) for score in scores]
        if against is not None:
            both = [seed for seed in runs if seed in results[against]] if name != against else []
            gains = [runs[seed][first] - results[against][seed][first] for seed in both]
            cells.append(_cell(gains, sign="+"))
        cells.append(_cell([100 * run["plain_share"] for run in runs.values()]))
        cells += [_cell([_mean(runs, cost) / base[cost]], digits=2) for cost in costs]
        lines.append(f"| {' | '.join([name, *cells, str(len(runs))])} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Runs], path: Path, cost: str = "flops") -> None:
    """Draws mAP against total compute, in multiples of the plain network's, with confidence intervals.

    Raises:
        ValueError: the plain network is not among the results, or has no such cost.
    """
    unit = _mean(results.get(PLAIN, {}), cost)
    if math.isnan(unit):
        raise ValueError(f"the figure counts compute in that of {PLAIN}: it must be among the methods")
    from matplotlib.figure import Figure
    from matplotlib.transforms import offset_copy

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel=f"{COSTS[cost]}, search included, in those of {PLAIN}", ylabel="mAP, %", xscale="log"
    )
    offset = offset_copy(axes.transData, figure, x=8, units="points")
    means = {name: (_mean(runs, cost) / unit, _mean(runs, "mAP")) for name, runs in results.items()}
    known = sorted(
        (name for name in means if not math.isnan(means[name][0])), key=lambda name: means[name][1]
    )
    heights = [means[name][1] for name in known]
    labels: list[tuple[float, float]] = []
    for name in known:
        place, height = means[name]
        axes.errorbar(
            place, height, interval([run["mAP"] for run in results[name].values()]), fmt="o", capsize=3
        )
        # Labels of points that cost about the same stand above one another.
        below = [y for x, y in labels if abs(math.log(x / place)) < 0.5]
        labels.append((place, max([height, *(y + 0.05 * (heights[-1] - heights[0]) for y in below)])))
        axes.annotate(name, means[name], labels[-1], size=8, va="center", xycoords="data", textcoords=offset)
    axes.set_xlim(0.9 * min(place for place, _ in labels), 1.7 * max(place for place, _ in labels))
    axes.grid(alpha=0.3, which="both")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _mean(runs: Runs, name: str) -> float:
    values = [run.get(name, math.nan) for run in runs.values()]
    return statistics.mean(values) if values else math.nan


def _cell(values: Sequence[float], sign: str = "", digits: int = 1) -> str:
    if not values or math.isnan(mean := statistics.mean(values)):
        return ""
    spread = interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")
