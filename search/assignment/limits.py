# SPDX-License-Identifier: Apache-2.0
"""Which branch sizes run fast on a device, as rules in channels and, for one layer, in units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BranchLimits:
    """Rules for the branches of every layer, in output channels.

    The sizes of a layer's branches are multiples of `channel_multiple`. If the layer's channels are none,
    one branch, where it costs least, takes the remainder besides: 24 channels in sixteens are 16 + 8 or 24.

    Args:
        channel_multiple: of every branch's size.
        min_branch: least channels of a branch that is there.
        max_branches: most branches of a layer; None: any number.

    Raises:
        ValueError: a value below 1.
    """

    channel_multiple: int = 1
    min_branch: int = 1
    max_branches: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {value}")

    @property
    def free(self) -> bool:
        """Whether every assignment keeps the rules."""
        return self == BranchLimits()

    def of_layer(self, units: int, channels: int, name: str | None = None) -> UnitLimits:
        """The rules in units of a layer: channels, or groups of a grouped layer.

        Raises:
            ValueError: the multiple or the least branch is more than the layer's channels.
        """
        for rule in ("channel_multiple", "min_branch"):
            if (value := getattr(self, rule)) > channels:
                what = rule.replace("_", " ")
                raise ValueError(
                    f"{name or 'layer'}: the {what} must be at most its {channels} channels, got {value}"
                )
        size = channels // units
        multiple = self.channel_multiple // math.gcd(self.channel_multiple, size)
        least = -(-self.min_branch // size)
        return UnitLimits(units, min(multiple, units), least, self.max_branches or units)


@dataclass(frozen=True)
class UnitLimits:
    """BranchLimits for a layer of `units` units; see `BranchLimits.of_layer`."""

    units: int
    multiple: int
    least: int
    most: int

    @property
    def remainder(self) -> int:
        return self.units % self.multiple

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Every size that a branch may have, ascending, without 0."""
        every = np.arange(self.least, self.units + 1)
        return every[np.isin(every % self.multiple, (0, self.remainder))]

    @property
    def most_open(self) -> int:
        """An upper bound of the number of branches."""
        smallest = max(self.multiple, self.least)
        return max(1, min(self.most, self.units // smallest + (self.remainder > 0)))

    def allow(self, sizes: NDArray[np.int64]) -> bool:
        """Whether a layer may have branches of these sizes; zeros are no branches."""
        there = sizes[sizes > 0]
        odd = there[there % self.multiple != 0]
        return (
            there.sum() == self.units
            and there.min() >= self.least
            and len(there) <= self.most
            and len(odd) <= 1
            and bool((odd % self.multiple == self.remainder).all())
        )


# cpu: oneDNN's time goes in steps of 16 output channels. cuda: the width of a tile, not measured yet.
TARGETS: Mapping[str, BranchLimits] = MappingProxyType(
    {"cpu": BranchLimits(16, max_branches=8), "cuda": BranchLimits(32, max_branches=8)}
)
