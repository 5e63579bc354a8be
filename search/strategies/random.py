# SPDX-License-Identifier: Apache-2.0
"""Every unit draws its dilation: the control that any search must beat."""

from __future__ import annotations

from ic_conv.pattern import DilationPattern, LayerPattern
from search.strategies.base import SearchTask, Strategy


class RandomStrategy(Strategy):
    """Each unit takes any candidate with equal probability."""

    name = "random"

    def search(self, task: SearchTask) -> DilationPattern:
        candidates = task.space.candidates
        layers = (
            LayerPattern.from_assignment(
                [candidates[i] for i in task.rng(index).integers(len(candidates), size=units)], name
            )
            for index, (name, units) in enumerate(task.units.items())
        )
        return DilationPattern(tuple(layers), task.space.kernel, task.space.base_kernel)
