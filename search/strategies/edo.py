# SPDX-License-Identifier: Apache-2.0
"""Efficient dilation optimisation (IC-Conv, CVPR 2021): each channel keeps its best dilated sub-kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ic_conv.pattern import DilationPattern
from search.assign import assign_argmin, assign_within, best_candidates, unit_errors
from search.assignment import BranchLimits, UnitLimits
from search.criteria import DEFAULT_CRITERION, FIRST_ORDER, criterion, needs_correlations, needs_residuals
from search.sharing import gathered, own
from search.statistics import LayerMoments, collect
from search.strategies.base import SearchTask, Strategy
from search.supernet import SuperInvolution2d, open_candidates, super_layers


class EDOStrategy(Strategy):
    """Collects moments over the calibration data, then takes each channel's best candidate.

    Of a supernet that was narrowed while it trained, a channel takes one of the candidates that it has left.

    Args:
        criterion: what "best" means, see `search.criteria`.
        limits: sizes and number of branches that run fast; by default there are none, as in the paper.

    Raises:
        ValueError: the criterion is unknown.
    """

    name = "edo"
    needs_supernet = True

    def __init__(
        self,
        criterion: str = DEFAULT_CRITERION,
        limits: BranchLimits | None = None,
    ) -> None:
        self.residuals, self.correlations = needs_residuals(criterion), needs_correlations(criterion)
        self.criterion, self.limits = criterion, limits or BranchLimits()

    def check(self, task: SearchTask) -> None:
        self._unit_limits(task)
        grown = {} if task.supernet is None or not self.correlations else super_layers(task.supernet)
        for name, layer in grown.items():
            if isinstance(layer, SuperInvolution2d):
                raise ValueError(f"{name}: the criterion refit is for convolutions, this is an involution")

    def search(self, task: SearchTask) -> DilationPattern:
        return self.from_moments(task, self._collect(task))

    def narrowed(self, task: SearchTask, count: int) -> dict[str, NDArray[np.bool_]]:
        """The `count` best candidates of each unit, bool (units, candidates) by layer."""
        errors = self._errors(task, self._collect(task))
        return {
            name: best_candidates(self._allowed(task, name, of), count, name) for name, of in errors.items()
        }

    def from_moments(self, task: SearchTask, moments: dict[str, LayerMoments]) -> DilationPattern:
        """The pattern for moments that were collected before. Costs no forward pass."""
        limits = self._unit_limits(task)
        layers, mean_errors, of_candidates, gaps = [], {}, {}, {}
        of_criteria: dict[str, dict[str, float]] = {
            other: {} for other in FIRST_ORDER if other != self.criterion
        }
        for name, errors in self._errors(task, moments).items():
            allowed = self._allowed(task, name, errors)
            if self.limits.free:
                layer, total = assign_argmin(allowed, task.space, name), allowed.min(axis=1).sum()
            else:
                layer, solution = assign_within(allowed, task.space.candidates, limits[name], name)
                total, gaps[name] = solution.total, round(solution.gap, 6)
            layers.append(layer)
            mean_errors[name] = round(float(total / len(errors)), 6)
            of_candidates[name] = errors.mean(axis=0).round(6).tolist()
            for other, means in of_criteria.items():
                choice = unit_errors(criterion(other)(moments[name], task.space), task.units[name]).argmin(1)
                means[name] = round(float(errors[np.arange(len(errors)), choice].mean()), 6)
        pattern = DilationPattern(tuple(layers), task.space.kernel, task.space.base_kernel)
        strides = {name: moment.stride for name, moment in moments.items()}
        meta = {
            "criterion": self.criterion,
            "layer_error": mean_errors,
            "candidate_error": of_candidates,  # what any other pattern of these counts would lose, on average
            "criteria_error": of_criteria,  # what the choices of other criteria lose
            "layer_stride": strides,
        }
        return replace(
            pattern, meta=meta | ({"limits": asdict(self.limits), "layer_gap": gaps} if gaps else {})
        )

    def _collect(self, task: SearchTask) -> dict[str, LayerMoments]:
        if task.supernet is None:
            raise ValueError("the strategy edo needs a trained supernet, got none")
        return collect(
            task.supernet,
            task.batches(),
            task.space,
            residuals=self.residuals,
            correlations=self.correlations,
            shared=True,
        )

    def _errors(
        self, task: SearchTask, moments: Mapping[str, LayerMoments]
    ) -> dict[str, NDArray[np.float64]]:
        """By layer: (units, candidates)."""
        errors_of = criterion(self.criterion)

        def of(name: str) -> NDArray[np.float64]:
            return unit_errors(errors_of(moments[name], task.space), task.units[name])

        if not self.correlations:
            return {name: of(name) for name in task.units}
        found = gathered({name: of(name) for name in own(task.units)})
        return {name: found[name] for name in task.units}

    def _allowed(self, task: SearchTask, name: str, errors: NDArray[np.float64]) -> NDArray[np.float64]:
        """The errors, larger than any where a unit may not take the candidate."""
        assert task.supernet is not None
        left = open_candidates(super_layers(task.supernet)[name])
        return np.where(left, errors, errors.max() + 1)

    def _unit_limits(self, task: SearchTask) -> dict[str, UnitLimits]:
        """The limits in units of each layer.

        Raises:
            ValueError: a layer is too small for them.
        """
        return {
            name: self.limits.of_layer(task.units[name], channels, name)
            for name, channels in layer_channels(task).items()
        }


def layer_channels(task: SearchTask) -> dict[str, int]:
    """Output channels of each layer of the task's supernet."""
    layers = {} if task.supernet is None else super_layers(task.supernet)
    return {
        name: layer.out_channels if isinstance(layer, nn.Conv2d) else layer.channels
        for name, layer in layers.items()
    }


def edo(
    supernet: nn.Module, batches: Iterable[Any], *, criterion: str = DEFAULT_CRITERION
) -> DilationPattern:
    """The pattern of a trained supernet.

    Args:
        supernet: made by `convert_to_supernet`, then trained.
        batches: calibration data, for example a data loader; one pass is made.
        criterion: ``energy``, ``expectation``, ``taps``, ``mse`` or ``refit``.

    Example:
        >>> pattern = edo(supernet, calibration_loader)     # doctest: +SKIP
        >>> pattern.save("my_k9.json")                      # doctest: +SKIP
    """
    return EDOStrategy(criterion).search(SearchTask.of(supernet, batches))
