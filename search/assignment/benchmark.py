# SPDX-License-Identifier: Apache-2.0
"""What fast branch sizes cost in error, and how long it takes to find them, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from search.assignment.limits import BranchLimits, UnitLimits
from search.assignment.solve import solve
from search.assignment.transport import Errors

# Channels of the 3x3 layers.
RESNETS = {
    50: (64,) * 3 + (128,) * 4 + (256,) * 6 + (512,) * 3,
    101: (64,) * 3 + (128,) * 4 + (256,) * 23 + (512,) * 3,
}


def random_errors(depth: int, candidates: int, seed: int = 0) -> dict[str, Errors]:
    """Independent uniform errors for every layer of a ResNet, (channels, candidates)."""
    rng = np.random.default_rng(seed)
    return {
        f"{index}: {channels}": rng.random((channels, candidates))
        for index, channels in enumerate(RESNETS[depth])
    }


def benchmark(errors: Iterable[tuple[str, Errors]], limits: BranchLimits) -> Iterator[dict[str, Any]]:
    """A row for each layer: total errors of plain argmin, rounding by hand and the solver; gap and time."""
    for name, layer in errors:
        units = limits.of_layer(len(layer), len(layer), name)
        start = time.process_time()
        found = solve(layer, units)
        seconds = time.process_time() - start
        yield {
            "layer": name,
            "argmin": float(layer.min(axis=1).sum()),
            "rounded": rounded_total(layer, units),
            "assigned": found.total,
            "gap_percent": 100 * found.gap,
            "branches": int((np.bincount(found.candidate) > 0).sum()),
            "cpu_seconds": seconds,
        }


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The row below the others: sums, and the mean gap."""
    rows = list(rows)
    sums = {key: sum(row[key] for row in rows) for key in ("argmin", "rounded", "assigned", "cpu_seconds")}
    mean = sum(row["gap_percent"] for row in rows) / len(rows)
    return {
        **rows[0],
        "layer": "all",
        **sums,
        "gap_percent": mean,
        "branches": sum(r["branches"] for r in rows),
    }


def rounded_total(errors: Errors, limits: UnitLimits) -> float:
    """Rounding by hand: the most frequent best candidates, counts rounded, surest units first.

    Args:
        errors: (units, candidates).
        limits: the multiple and the number of branches are kept.
    """
    counts = np.bincount(errors.argmin(axis=1), minlength=errors.shape[1])
    kept = np.argsort(-counts, kind="stable")[: limits.most_open]
    share = counts[kept] / counts[kept].sum() * (limits.units // limits.multiple)
    room = np.floor(share).astype(np.int64)
    room[np.argsort(room - share, kind="stable")[: limits.units // limits.multiple - room.sum()]] += 1
    room *= limits.multiple
    room[0] += limits.remainder
    offered = errors[:, kept]
    least = np.sort(offered, axis=1)
    surest = np.argsort(least[:, 0] - least[:, min(1, len(kept) - 1)], kind="stable")
    total = 0.0
    for unit in surest:
        best = int(np.where(room > 0, offered[unit], np.inf).argmin())
        room[best] -= 1
        total += float(offered[unit, best])
    return total
