# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a search: one file, no scripts, nothing fetched."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ic_conv._files import write_text
from ic_conv.pattern import DilationPattern, LayerPattern
from search.report import charts
from search.report.effective import SHARE
from search.report.figure import receptive_field, short_name, stages
from search.report.peers import Comparison, compare_peers, criteria_errors
from search.report.record import RunRecord


def write_report(
    pattern: DilationPattern,
    record: RunRecord,
    path: str | os.PathLike[str],
    pattern_path: str = "pattern.json",
    more: Comparison | None = None,
) -> None:
    """Writes the page in one atomic step; parts for which pattern and record hold nothing are left out.

    Args:
        pattern: what the search found, with its meta.
        record: what the run left, see `search.report.record`.
        path: the page.
        pattern_path: the pattern file, as the page names it.
        more: what else it is compared with.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"percent": "{:.0%}".format, "duration": duration}
    template = environment.from_string(files("search.report").joinpath("page.html").read_text("utf-8"))
    write_text(path, template.render(_context(pattern, record, pattern_path, more or Comparison())))


def report_run(pattern: DilationPattern, record: RunRecord, pattern_path: Path) -> Path:
    """Writes record and page of a finished search beside its pattern file; returns the page's path."""
    record.save(record_path(pattern_path))
    write_report(pattern, record, report_path(pattern_path), str(pattern_path))
    return report_path(pattern_path)


def report_path(pattern_path: Path) -> Path:
    """Where the page of a pattern lies."""
    return pattern_path.with_suffix(".html")


def record_path(pattern_path: Path) -> Path:
    """Where the record of a pattern's run lies."""
    return pattern_path.with_suffix(".report.json")


def remake_reports(place: Path, more: Comparison | None = None) -> list[Path]:
    """Writes the pages of a work folder, or of one pattern file, again from what the runs left.

    Args:
        place: the folder or file.
        more: what else they are compared with.

    Raises:
        ValueError: the folder holds no pattern with a meta file, or a file breaks a rule.
        OSError: a file cannot be read or written.
    """
    if place.is_dir():
        found = [
            path.with_name(path.name.replace(".meta.json", ".json")) for path in place.glob("*.meta.json")
        ]
        if not found:
            raise ValueError(f"{place} must hold a search's result, ARCH_kKERNEL.json with its .meta.json")
    else:
        found = [place]
    for path in sorted(found):
        record = record_path(path)
        write_report(
            DilationPattern.load(path),
            RunRecord.load(record) if record.exists() else RunRecord(),
            report_path(path),
            str(path),
            more,
        )
    return [report_path(path) for path in sorted(found)]


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _context(
    pattern: DilationPattern, record: RunRecord, pattern_path: str, more: Comparison
) -> dict[str, Any]:
    meta = pattern.meta
    whole = _pooled(pattern.layers)
    growth = receptive_field(pattern)[-1].mean() / receptive_field(pattern, plain=True)[-1].mean()
    peers = compare_peers(pattern, more.patterns)
    curve = record.curve
    rates = all(math.isfinite(rate) for rate in curve.get("lr", [math.nan]))
    return {
        "pattern": pattern,
        "meta": meta,
        "record": record,
        "title": f"{meta.get('architecture', 'network')}, kernel {pattern.kernel}",
        "pattern_path": pattern_path,
        "whole": whole,
        "growth": float(growth),
        "in_pixels": "layer_stride" in meta,
        "stages": [_stage(pattern, name, indices) for name, indices in stages(pattern)],
        "rows": _layer_rows(pattern),
        "dilation_chart": charts.chart(lambda axis: charts.draw_dilation(axis, pattern)),
        "field_chart": charts.chart(lambda axis: charts.draw_theory(axis, pattern)),
        "fields": _fields(record),
        "share": SHARE,
        "peers": peers,
        "criteria": criteria_errors(pattern),
        "table": more.table,
        "again": ["python", "tools/visualize.py", "report", pattern_path, *more.options],
        "error_chart": charts.chart(lambda axis: charts.draw_errors(axis, pattern, peers)) if peers else None,
        "curve_chart": charts.chart(lambda axis: charts.draw_curve(axis, curve)) if curve else None,
        "rate_chart": charts.chart(lambda axis: charts.draw_learning_rate(axis, curve)) if rates else None,
        "facts": _facts(pattern, record),
        "pooled": _pooled,
        "quoted": repr,
        "shell": shlex.join,
    }


def _pooled(layers: Sequence[LayerPattern]) -> dict[str, Any]:
    """What a group of layers has in common: each unit counts once."""
    units = [layer.units for layer in layers]
    dy, dx = np.average([layer.mean_dilation for layer in layers], axis=0, weights=units)
    plain = float(np.average([layer.plain_share for layer in layers], weights=units))
    return {"layers": len(layers), "units": sum(units), "plain": plain, "dy": float(dy), "dx": float(dx)}


def _stage(pattern: DilationPattern, name: str, indices: Sequence[int]) -> dict[str, Any]:
    layers = [pattern.layers[index] for index in indices]
    tiles = [_tile(pattern, index) for index in indices]
    return {"name": name, "tiles": tiles, **_pooled(layers)}


def _tile(pattern: DilationPattern, index: int) -> dict[str, Any]:
    """The heat maps of a layer: opacity and words for each dilation."""
    layer = pattern.layers[index]
    shares = {d: count / layer.units for d, count in layer.branches}
    top = sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:3]
    name = layer.name or f"layer {index}"
    tile: dict[str, Any] = {
        "name": short_name(layer.name, index),
        "plain": layer.plain_share,
        "label": f"{name}: " + ", ".join(f"dilation {dy} by {dx} {share:.0%}" for (dy, dx), share in top),
        "cells": [_cell(d, math.sqrt(share), f"{share:.1%}") for d, share in shares.items()],
        "error_cells": [],
    }
    errors = pattern.meta.get("candidate_error", {}).get(layer.name)
    if errors:
        low, high = min(errors), max(errors)
        tile["error"], tile["best"] = low, pattern.candidates[errors.index(low)]
        tile["error_label"] = (
            f"{name}: error {low:.3f} at dilation {tile['best'][0]} by {tile['best'][1]}, up to {high:.3f}"
        )
        tile["error_cells"] = [
            _cell(d, (high - error) / ((high - low) or 1), f"{error:.3f}")
            for d, error in zip(pattern.candidates, errors, strict=True)
        ]
    return tile


def _cell(dilation: tuple[int, int], opacity: float, value: str) -> dict[str, Any]:
    dy, dx = dilation
    return {"x": dx - 1, "y": dy - 1, "opacity": f"{opacity:.2f}", "title": f"({dy}, {dx}): {value}"}


def _layer_rows(pattern: DilationPattern) -> list[dict[str, Any]]:
    errors = pattern.meta.get("layer_error", {})
    return [
        {
            "name": layer.name or f"layer {index}",
            "units": layer.units,
            "plain": layer.plain_share,
            "mean": layer.mean_dilation,
            "window": layer.window(pattern.base_kernel),
            "largest": layer.max_dilation,
            "branches": len(layer.branches),
            "error": errors.get(layer.name),
        }
        for index, layer in enumerate(pattern.layers)
    ]


def _fields(record: RunRecord) -> list[dict[str, Any]]:
    """Pictures and extents of the effective receptive fields."""
    return [
        {
            "layer": layer,
            "parts": [
                {"kind": kind, "picture": charts.gradient_picture(part["map"]), **part}
                for kind, part in pair.items()
            ],
            "ratio": _ratio(pair["found"]["extent"], pair["plain"]["extent"]),
        }
        for layer, pair in record.fields.items()
    ]


def _ratio(found: Sequence[float], plain: Sequence[float]) -> float | None:
    return math.sqrt(math.prod(found) / math.prod(plain)) if min(plain) > 0 else None


def _facts(pattern: DilationPattern, record: RunRecord) -> list[tuple[str, str]]:
    """What was run, line by line; what is not known is left out."""
    meta = pattern.meta
    training, size = meta.get("training", {}), meta.get("image_size")
    lines = {
        "network": meta.get("architecture"),
        "kernels": f"{pattern.base_kernel}x{pattern.base_kernel} grown to {pattern.kernel}x{pattern.kernel}, "
        f"{len(pattern.candidates)} dilations",
        "strategy": meta.get("strategy"),
        "criterion": meta.get("criterion"),
        "data": meta.get("data") and f"{meta['data']}{f', {size} px' if size else ''}",
        "calibration": meta.get("calibration_images") and f"{meta['calibration_images']} images",
        "training": f"{training['steps']} steps of {training['batch_size']} images"
        if "steps" in training
        else training.get("checkpoint") and f"none here, supernet from {training['checkpoint']}",
        "seed": str(meta["seed"]) if "seed" in meta else None,
        "branch limits": ", ".join(f"{key} {value}" for key, value in meta.get("limits", {}).items()),
        "took": None if record.seconds is None else duration(record.seconds),
        "on": record.device,
        "versions": ", ".join(f"{name} {number}" for name, number in meta.get("versions", {}).items()),
        "supernet": meta.get("supernet_sha256") and f"SHA-256 {meta['supernet_sha256'][:16]}…",
    }
    return [(name, str(text)) for name, text in lines.items() if text]
