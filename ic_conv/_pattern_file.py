# SPDX-License-Identifier: Apache-2.0
"""Reading and writing pattern files.

The pattern file is the published format: a JSON list with one object per layer, key "(i, j)" for dilation
(i + 1, j + 1), value the number of units. Beside it may lie `<name>.meta.json` with what the list cannot
say: kernel, layer names, the dilation of each unit, provenance.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ic_conv._files import write_text

if TYPE_CHECKING:
    from ic_conv.pattern import Dilation, DilationPattern, LayerPattern

FORMAT_VERSION = 1
LARGEST_FILE_DILATION = 64  # a kernel of 129: beyond any use, and a slip of the pen most likely
_KEY = re.compile(r"\( ?([0-9]{1,4}), ?([0-9]{1,4}) ?\)")
_INT_LIST = re.compile(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]")


def meta_path(path: str | os.PathLike[str]) -> Path:
    """`found/k9.json` has its provenance in `found/k9.meta.json`."""
    return Path(path).with_suffix(".meta.json")


def load(path: str | os.PathLike[str]) -> DilationPattern:
    from ic_conv.pattern import DilationPattern

    document = _read_json(Path(path))
    if not isinstance(document, list) or not document:
        raise ValueError(f"{path}: a pattern file is a list with one object per layer, got {_kind(document)}")
    counts = [_layer_counts(layer, f"{path}: layer {index}") for index, layer in enumerate(document)]
    meta_file = meta_path(path)
    meta = _read_json(meta_file) if meta_file.exists() else None
    # Files list empty branches too, so the largest key tells the kernel of a file without meta.
    largest = max(max(dilation) for layer in counts for dilation in layer)
    try:
        layers = _layers(counts, meta)
        if meta is None:
            pattern = DilationPattern(layers, kernel=2 * largest + 1)
        else:
            provenance = _mapping(meta["provenance"], "provenance")
            pattern = DilationPattern(layers, meta["kernel"], meta["base_kernel"], provenance)
    except KeyError as error:
        raise ValueError(f"{meta_file}: the key {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path if meta is None else meta_file}: {error}") from None
    return replace(pattern, source=os.fspath(path))


def save(pattern: DilationPattern, path: str | os.PathLike[str]) -> None:
    where = Path(path)
    if where.suffix != ".json":
        raise ValueError(f"a pattern file's name must end in .json, got {path}")
    document = [_layer_document(layer, pattern.candidates) for layer in pattern.layers]
    meta = {
        "format_version": FORMAT_VERSION,
        "kernel": pattern.kernel,
        "base_kernel": pattern.base_kernel,
        "layers": [_layer_meta(layer, pattern.max_dilation) for layer in pattern.layers],
        "provenance": dict(pattern.meta),
    }
    pattern_text, meta_text = _json(document), _json(meta)  # both must be writable before either is written
    write_text(meta_path(where), meta_text)
    write_text(where, pattern_text)


def _layer_document(layer: LayerPattern, candidates: Sequence[Dilation]) -> dict[str, int]:
    counts = layer.counts
    filled = list(counts)
    # The order of the non-empty branches is the order of the weights, so it must survive; row by row, as
    # the published files have it, whenever the branches stand so.
    in_rows = filled == sorted(filled)
    order = (
        candidates if in_rows else filled + [dilation for dilation in candidates if dilation not in counts]
    )
    return {f"({dy - 1}, {dx - 1})": counts.get((dy, dx), 0) for dy, dx in order}


def _layer_meta(layer: LayerPattern, max_dilation: int) -> dict[str, Any]:
    units = layer.assignment
    flat = None if units is None else [(dy - 1) * max_dilation + dx - 1 for dy, dx in units]
    return {"name": layer.name, "assignment": flat}


def _layers(counts: list[dict[Dilation, int]], meta: Any) -> tuple[LayerPattern, ...]:
    from ic_conv.pattern import LayerPattern, largest_dilation

    if meta is None:
        return tuple(LayerPattern.from_counts(layer) for layer in counts)
    meta = _mapping(meta, "the file")
    if meta["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION}, got {meta['format_version']!r}")
    side = largest_dilation(meta["kernel"], meta["base_kernel"])
    entries = meta["layers"]
    if not isinstance(entries, list) or len(entries) != len(counts):
        raise ValueError(
            f"layers must be a list of {len(counts)}, as in the pattern file, got {_kind(entries)}"
        )
    layers = []
    for index, (layer, entry) in enumerate(zip(counts, entries, strict=True)):
        entry = _mapping(entry, f"layer {index}")
        name, flat = entry["name"], entry["assignment"]
        if name is not None and not isinstance(name, str):
            raise ValueError(f"layer {index}: the name must be a string or null, got {name!r}")
        plain = LayerPattern.from_counts(layer, name)
        units = None if flat is None else _unflatten(flat, side, f"layer {name or index}")
        layers.append(LayerPattern(plain.branches, name, units))
    return tuple(layers)


def _unflatten(flat: Any, side: int, where: str) -> tuple[Dilation, ...]:
    if not isinstance(flat, list) or any(type(i) is not int or not 0 <= i < side * side for i in flat):
        raise ValueError(f"{where}: the assignment must list integers from 0 to {side * side - 1}")
    return tuple((index // side + 1, index % side + 1) for index in flat)


def _layer_counts(layer: Any, where: str) -> dict[Dilation, int]:
    counts: dict[Dilation, int] = {}
    for key, count in _mapping(layer, where).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f'{where}: a key must read "(i, j)" with i, j >= 0, got {key!r}')
        dilation = int(match[1]) + 1, int(match[2]) + 1
        if max(dilation) > LARGEST_FILE_DILATION:
            raise ValueError(f"{where}: dilations may reach {LARGEST_FILE_DILATION}, got {dilation}")
        if dilation in counts:
            raise ValueError(f"{where}: each key may stand once, got {key!r} twice")
        if type(count) is not int or count < 0:
            raise ValueError(f"{where}: the count of {key!r} must be an integer >= 0, got {count!r}")
        counts[dilation] = count
    if not any(counts.values()):
        raise ValueError(f"{where}: a layer needs at least one count above zero")
    return counts


def _read_json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"each key may stand once, got {max(keys, key=keys.count)!r} twice")
        return document

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON document of a pattern: {error}") from None


def _json(document: Any) -> str:
    """Indented JSON in which a list of integers stays on one line."""
    text = json.dumps(document, indent=2, allow_nan=False)
    return _INT_LIST.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text) + "\n"


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, list | dict) else ""
    return f"{type(value).__name__}{size}"
