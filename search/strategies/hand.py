# SPDX-License-Identifier: Apache-2.0
"""The rule of thumb that the authors of IC-Conv gave to those who asked for the search."""

from __future__ import annotations

from ic_conv.pattern import PLAIN, DilationPattern, LayerPattern
from search.strategies.base import SearchTask, Strategy


class HandStrategy(Strategy):
    """A share of plain units, the rest spread evenly over the other dilations.

    Args:
        first_plain: share of plain units in the first half of the layers.
        later_plain: the same in the second half.
    """

    name = "hand"

    def __init__(self, first_plain: float = 0.5, later_plain: float = 0.7) -> None:
        for share in (first_plain, later_plain):
            if not 0 <= share <= 1:
                raise ValueError(f"a share of plain units must lie between 0 and 1, got {share}")
        self.first_plain, self.later_plain = first_plain, later_plain

    def search(self, task: SearchTask) -> DilationPattern:
        half = (len(task.units) + 1) // 2
        dilated = [dilation for dilation in task.space.candidates if dilation != PLAIN]
        layers = []
        for index, (name, units) in enumerate(task.units.items()):
            plain = round(units * (self.first_plain if index < half else self.later_plain))
            each, left = divmod(units - plain, len(dilated))
            # Which dilations take one unit more is drawn, so that small ones are not always preferred.
            extra = {int(i) for i in task.rng(index).permutation(len(dilated))[:left]}
            counts = {PLAIN: plain} | {d: each + (i in extra) for i, d in enumerate(dilated)}
            layers.append(LayerPattern.from_counts(counts, name))
        return DilationPattern(tuple(layers), task.space.kernel, task.space.base_kernel)
