# SPDX-License-Identifier: Apache-2.0
"""Every unit of every layer has the same dilation."""

from __future__ import annotations

from ic_conv.pattern import Dilation, DilationPattern, LayerPattern
from search.strategies.base import SearchTask, Strategy


class UniformStrategy(Strategy):
    """One dilation for all.

    Args:
        dilation: that dilation (dy, dx).
    """

    name = "uniform"

    def __init__(self, dilation: Dilation = (2, 2)) -> None:
        self.dilation = dilation

    def search(self, task: SearchTask) -> DilationPattern:
        layers = (
            LayerPattern.from_counts({self.dilation: units}, name) for name, units in task.units.items()
        )
        return DilationPattern(tuple(layers), task.space.kernel, task.space.base_kernel)
