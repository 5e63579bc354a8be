# SPDX-License-Identifier: Apache-2.0
"""Efficient dilation optimisation (IC-Conv, CVPR 2021): each channel keeps its best dilated sub-kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from ic_conv.pattern import DilationPattern
from search.assign import assign_argmin, unit_errors
from search.criteria import DEFAULT_CRITERION, criterion, needs_residuals
from search.statistics import LayerMoments, collect
from search.strategies.base import SearchTask, Strategy


class EDOStrategy(Strategy):
    """Collects moments over the calibration data, then takes each channel's best candidate.

    Args:
        criterion: what "best" means, see `search.criteria`.

    Raises:
        ValueError: the criterion is unknown.
    """

    name = "edo"
    needs_supernet = True

    def __init__(self, criterion: str = DEFAULT_CRITERION) -> None:
        self.residuals = needs_residuals(criterion)
        self.criterion = criterion

    def search(self, task: SearchTask) -> DilationPattern:
        if task.supernet is None:
            raise ValueError("the strategy edo needs a trained supernet, got none")
        moments = collect(task.supernet, task.batches(), task.space, residuals=self.residuals)
        return self.from_moments(task, moments)

    def from_moments(self, task: SearchTask, moments: dict[str, LayerMoments]) -> DilationPattern:
        """The pattern for moments that were collected before. Costs no forward pass."""
        errors_of = criterion(self.criterion)
        layers, mean_errors = [], {}
        for name, units in task.units.items():
            errors = errors_of(moments[name], task.space)
            by_unit = unit_errors(errors, units)
            layers.append(assign_argmin(by_unit, task.space, name))
            mean_errors[name] = round(float(by_unit.min(axis=1).mean()), 6)
        pattern = DilationPattern(tuple(layers), task.space.kernel, task.space.base_kernel)
        strides = {name: moment.stride for name, moment in moments.items()}
        return replace(
            pattern, meta={"criterion": self.criterion, "layer_error": mean_errors, "layer_stride": strides}
        )


def edo(
    supernet: nn.Module, batches: Iterable[Any], *, criterion: str = DEFAULT_CRITERION
) -> DilationPattern:
    """The pattern of a trained supernet.

    Args:
        supernet: made by `convert_to_supernet`, then trained.
        batches: calibration data, for example a data loader; one pass is made.
        criterion: ``energy``, ``expectation``, ``taps`` or ``mse``.

    Example:
        >>> pattern = edo(supernet, calibration_loader)     # doctest: +SKIP
        >>> pattern.save("my_k9.json")                      # doctest: +SKIP
    """
    return EDOStrategy(criterion).search(SearchTask.of(supernet, batches))
