# SPDX-License-Identifier: Apache-2.0
"""From errors to a layer's pattern: each unit's best candidate, or branches of sizes that run fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ic_conv.pattern import Dilation, LayerPattern
from search.assignment import Solution, UnitLimits, solve
from search.space import DilationSpace


def unit_errors(errors: Tensor, units: int) -> NDArray[np.float64]:
    """Mean error of the channels of each unit: (channels, candidates) -> (units, candidates)."""
    return errors.unflatten(0, (units, -1)).mean(1).numpy()


def assign_argmin(errors: NDArray[np.float64], space: DilationSpace, name: str | None = None) -> LayerPattern:
    """Each unit takes its best candidate; of equal ones the first, so a dead channel becomes plain.

    Args:
        errors: (units, candidates).
        space: gives the candidates' dilations.
        name: the layer's name, carried into the pattern.

    Raises:
        ValueError: an error is not finite.
    """
    best = _checked(errors, name).argmin(axis=1)
    return LayerPattern.from_assignment([space.candidates[index] for index in best], name)


def best_candidates(errors: NDArray[np.float64], count: int, name: str | None = None) -> NDArray[np.bool_]:
    """Which candidates are a unit's `count` best: bool (units, candidates); of equal ones the first.

    Raises:
        ValueError: an error is not finite.
    """
    order = _checked(errors, name).argsort(axis=1, kind="stable")
    best = np.zeros(errors.shape, dtype=bool)
    np.put_along_axis(best, order[:, :count], True, axis=1)
    return best


def assign_within(
    errors: NDArray[np.float64],
    candidates: Sequence[Dilation],
    limits: UnitLimits,
    name: str | None = None,
    **search: float,
) -> tuple[LayerPattern, Solution]:
    """The assignment of least total error within the limits, and how near to the least it is proven to be.

    Args:
        errors: (units, candidates).
        candidates: their dilations.
        limits: sizes and number of the layer's branches.
        name: the layer's name, carried into the pattern.
        search: tolerance and effort of `search.assignment.solve`.

    Raises:
        ValueError: an error is not finite.
    """
    solution = solve(_checked(errors, name), limits, **search)
    assignment = [candidates[index] for index in solution.candidate]
    return LayerPattern.from_assignment(assignment, name), solution


def _checked(errors: NDArray[np.float64], name: str | None) -> NDArray[np.float64]:
    if not np.isfinite(errors).all():
        raise ValueError(f"{name or 'layer'}: errors must be finite; does the supernet hold NaN weights?")
    # Rounding differs between machines by an ulp or so; ties must not.
    return np.round(errors, 12)
