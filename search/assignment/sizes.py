# SPDX-License-Identifier: Apache-2.0
"""The branch sizes of a set that may hold a better assignment, in order of their bound.

Legend: U units, P branches.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from search.assignment.bounds import Bound, prefix_sums
from search.assignment.limits import UnitLimits
from search.assignment.transport import Errors, Indices


def by_bound(errors: Errors, limits: UnitLimits, bound: Bound) -> Iterator[tuple[float, Indices]]:
    """All sizes that keep the limits, the one with the least bound first.

    Under given multipliers a branch's part of the bound depends on its size alone. Best-first search; what
    the branches that are still open can reach at best is known from a table (dynamic programming).

    Args:
        errors: (P, U).
        bound: gives the multipliers.

    Yields:
        Bound and sizes (P,).
    """
    units = limits.units
    sizes = np.concatenate([[0], limits.sizes])
    parts = np.zeros((len(errors), len(sizes)))
    parts[:, 1:] = prefix_sums(errors, limits, bound.multipliers)
    best = np.full((len(errors) + 1, units + 1), np.inf)  # by first open branch and units left
    best[-1, 0] = 0.0
    for branch in range(len(errors) - 1, -1, -1):
        for size, part in zip(sizes, parts[branch], strict=True):
            np.minimum(
                best[branch, size:], best[branch + 1, : units + 1 - size] + part, out=best[branch, size:]
            )
    heap: list[tuple[float, tuple[int, ...]]] = [(bound.constant + float(best[0, units]), ())]
    while heap:
        value, chosen = heapq.heappop(heap)
        if len(chosen) == len(errors):
            if limits.allow(np.array(chosen)):
                yield value, np.array(chosen)
            continue
        left = units - sum(chosen)
        fitting = sizes <= left
        after = best[len(chosen) + 1, left - sizes[fitting]]
        values = value - best[len(chosen), left] + parts[len(chosen), fitting] + after
        for size, total in zip(sizes[fitting].tolist(), values.tolist(), strict=True):
            if np.isfinite(total):
                heapq.heappush(heap, (total, (*chosen, size)))
