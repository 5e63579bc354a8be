# SPDX-License-Identifier: Apache-2.0
"""From errors to a layer's pattern."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ic_conv.pattern import LayerPattern
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
    if not np.isfinite(errors).all():
        raise ValueError(f"{name or 'layer'}: errors must be finite; does the supernet hold NaN weights?")
    # Rounding differs between machines by an ulp or so; ties must not.
    best = np.round(errors, 12).argmin(axis=1)
    return LayerPattern.from_assignment([space.candidates[index] for index in best], name)
