# SPDX-License-Identifier: Apache-2.0
"""Lower bounds of the total error, by Lagrangian relaxation.

The rule that each unit is in exactly one branch is priced by multipliers, one per unit. What remains falls
apart: each candidate takes the units whose error lies most below their multiplier, in the best allowed
number, and the best `most` candidates open (Cornuejols, Fisher and Nemhauser, Management Science 23, 1977,
for branches of any size). Every vector of multipliers gives a bound; a subgradient ascent finds good ones.

Legend: U units, D candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from search.assignment.limits import UnitLimits
from search.assignment.transport import Errors


@dataclass(frozen=True)
class Bound:
    """A lower bound and where it comes from.

    Attributes:
        value: no assignment has a smaller total error.
        constant: sum of the multipliers.
        savings: (D,), not positive; constant plus the savings of some candidates bounds what these can reach.
    """

    value: float
    constant: float
    savings: Errors
    multipliers: Errors


def dual_ascent(
    errors: Errors, limits: UnitLimits, most: int, upper: float, start: Errors, steps: int, enough: float
) -> Bound:
    """The best bound of `steps` subgradient steps.

    Args:
        errors: (D, U).
        most: most branches.
        upper: total error of a known assignment, for the step length.
        start: multipliers to begin with, (U,).
        enough: a bound of this size ends the ascent.
    """
    sizes = limits.sizes
    multipliers, best, scale, stale = start, None, 1.0, 0
    for _ in range(steps):
        sums = prefix_sums(errors, limits, multipliers)
        chosen = sums.argmin(axis=1)
        savings = np.minimum(sums[np.arange(len(sums)), chosen], 0.0)
        order = np.argsort(savings, kind="stable")[:most]
        constant = float(multipliers.sum())
        value = constant + float(savings[order].sum())
        if best is None or value > best.value + 1e-9 * abs(upper):
            best, stale = Bound(value, constant, savings, multipliers), 0
        else:
            stale += 1
        if best.value >= enough:
            break
        if stale == 5:
            scale, stale, multipliers = scale / 2, 0, best.multipliers
            if scale < 0.02:
                break
            continue
        gradient = np.ones(errors.shape[1])
        for row in order:
            if savings[row] < 0:
                size = sizes[chosen[row]]
                gradient[np.argpartition(errors[row] - multipliers, size - 1)[:size]] -= 1
        norm = gradient @ gradient
        if norm == 0:
            break
        multipliers = multipliers + scale * (upper - value) / norm * gradient
    assert best is not None
    return best


def prefix_sums(errors: Errors, limits: UnitLimits, multipliers: Errors) -> Errors:
    """What each candidate pays, multipliers off, for its best units in each allowed number: (D, sizes)."""
    return np.sort(errors - multipliers, axis=1).cumsum(axis=1)[:, limits.sizes - 1]
