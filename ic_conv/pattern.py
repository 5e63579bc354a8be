# SPDX-License-Identifier: Apache-2.0
"""The dilation pattern: which dilation (dy, dx) each output channel of each searchable layer has.

Dilations are real ones: (1, 1) is a plain convolution. Files are read and written by
`ic_conv._pattern_file`; this module holds the values and their rules.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ic_conv import _pattern_file
from ic_conv._pattern_summary import summarise

Dilation = tuple[int, int]
PLAIN: Dilation = (1, 1)


def largest_dilation(kernel: int, base_kernel: int = 3) -> int:
    """The largest dilation with which a base kernel fits into a kernel: 9 and 3 give 4.

    Raises:
        ValueError: a size is even or too small, or no whole dilation fills the kernel.
    """
    for name, size in (("base kernel", base_kernel), ("kernel", kernel)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 3 or size % 2 == 0:
            raise ValueError(f"the {name} must be an odd number of at least 3, got {size!r}")
    if (kernel - 1) % (base_kernel - 1):
        raise ValueError(
            f"the kernel must be d * (base kernel - 1) + 1 for a whole d, "
            f"got kernel {kernel} for base kernel {base_kernel}"
        )
    return (kernel - 1) // (base_kernel - 1)


@dataclass(frozen=True)
class LayerPattern:
    """The branches of one layer.

    Args:
        branches: pairs of dilation (dy, dx) and count, in file order, empty ones left out. A count is a
            number of *units*: output channels, or groups of a grouped convolution or an involution.
        name: the layer's module path, for example ``layer1.0.conv2``.
        assignment: the dilation of each unit in the network's own order, when a search decided unit by
            unit. It must give the same counts as the branches.

    Raises:
        ValueError: a rule is broken; the message names the layer, if it has a name.

    Example:
        >>> LayerPattern.from_counts({(1, 1): 48, (1, 4): 12, (3, 1): 4}).units
        64
    """

    branches: tuple[tuple[Dilation, int], ...]
    name: str | None = None
    assignment: tuple[Dilation, ...] | None = None

    def __post_init__(self) -> None:
        where = f"{self.name}: " if self.name else ""
        if not self.branches:
            raise ValueError(f"{where}a layer needs at least one branch with a count above zero")
        for dilation, count in self.branches:
            _check_dilation(dilation, where)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{where}the count of dilation {dilation} must be positive, got {count!r}")
        counts = dict(self.branches)
        if len(counts) != len(self.branches):
            raise ValueError(f"{where}each dilation may stand once, got {[d for d, _ in self.branches]}")
        if self.assignment is not None and Counter(self.assignment) != counts:
            raise ValueError(
                f"{where}the assignment must give the counts of the branches, {_counted(counts)}, "
                f"got {_counted(Counter(self.assignment))}"
            )

    @classmethod
    def from_counts(cls, counts: Mapping[Dilation, int], name: str | None = None) -> LayerPattern:
        """A layer from a mapping of dilation to count; counts of zero are left out."""
        branches = (((int(dy), int(dx)), count) for (dy, dx), count in counts.items())
        return cls(tuple(branch for branch in branches if branch[1] != 0), name)

    @classmethod
    def from_assignment(cls, assignment: Sequence[Dilation], name: str | None = None) -> LayerPattern:
        """A layer from the dilation of each unit; branches stand in order of (dy, dx)."""
        return cls(tuple(sorted(Counter(assignment).items())), name, tuple(assignment))

    @classmethod
    def plain(cls, units: int, name: str | None = None) -> LayerPattern:
        """A layer in which every unit has dilation (1, 1)."""
        return cls(((PLAIN, units),), name)

    @property
    def counts(self) -> dict[Dilation, int]:
        return dict(self.branches)

    @property
    def dilations(self) -> tuple[Dilation, ...]:
        """Of each unit: the assignment, or branch after branch where there is none."""
        return self.assignment or tuple(dilation for dilation, count in self.branches for _ in range(count))

    @property
    def units(self) -> int:
        """Output channels, or groups of a grouped layer."""
        return sum(count for _, count in self.branches)

    @property
    def max_dilation(self) -> int:
        return max(max(dilation) for dilation, _ in self.branches)

    @property
    def mean_dilation(self) -> tuple[float, float]:
        """Mean of dy and mean of dx over the units."""
        total = self.units
        dy = sum(dilation[0] * count for dilation, count in self.branches)
        dx = sum(dilation[1] * count for dilation, count in self.branches)
        return dy / total, dx / total

    @property
    def plain_share(self) -> float:
        """Share of the units with dilation (1, 1)."""
        return self.counts.get(PLAIN, 0) / self.units

    def window(self, base_kernel: int = 3) -> tuple[float, float]:
        """Mean height and width, in pixels of the layer's input, that an output sees."""
        dy, dx = self.mean_dilation
        return dy * (base_kernel - 1) + 1, dx * (base_kernel - 1) + 1

    def order(self) -> tuple[int, ...]:
        """`order()[j]` is the original unit that stands at position j when branches stand in a row."""
        if self.assignment is None:
            return tuple(range(self.units))
        position = {dilation: index for index, (dilation, _) in enumerate(self.branches)}
        return tuple(sorted(range(self.units), key=lambda unit: position[self.assignment[unit]]))  # type: ignore[index]


@dataclass(frozen=True)
class DilationPattern:
    """The patterns of a network's searchable layers, in module order.

    Args:
        layers: one LayerPattern per layer.
        kernel: size of the supernet's kernels; dilations reach (kernel - 1) / (base_kernel - 1).
        base_kernel: size of the kernels that are dilated.
        meta: provenance as plain JSON values; not compared.
        source: the file it was read from, named in errors; not compared.

    Raises:
        ValueError: no layer, a repeated layer name, a kernel or a dilation out of range.

    Example:
        >>> pattern = DilationPattern((LayerPattern.from_counts({(1, 1): 6, (2, 4): 2}),), kernel=9)
        >>> pattern.layers[0].mean_dilation
        (1.25, 1.75)
    """

    layers: tuple[LayerPattern, ...]
    kernel: int
    base_kernel: int = 3
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    source: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        limit = largest_dilation(self.kernel, self.base_kernel)
        if not self.layers:
            raise ValueError(f"{self._where()}a pattern needs at least one layer")
        for index, layer in enumerate(self.layers):
            if layer.max_dilation > limit:
                raise ValueError(
                    f"{self._where()}layer {layer.name or index}: "
                    f"dilations of kernel {self.kernel} reach {limit}, got {layer.max_dilation}"
                )
        repeated = [name for name, count in Counter(self.names).items() if name and count > 1]
        if repeated:
            raise ValueError(f"{self._where()}each layer name may stand once, got {repeated[0]} twice")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DilationPattern:
        """Reads a pattern file of the published format, and its `.meta.json` when one is there.

        Raises:
            ValueError: the file breaks a rule; the message names the file, the layer and the rule.
            OSError: the file is missing or cannot be read.
        """
        return _pattern_file.load(path)

    def save(self, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> None:
        """Writes the pattern file and its `.meta.json`, each in one atomic step.

        Args:
            path: the pattern file, ``found/ic_resnet50_k9.json`` for example.
            meta: provenance to store; the pattern's own `meta` by default.
        """
        _pattern_file.save(self if meta is None else replace(self, meta=meta), path)

    @property
    def names(self) -> tuple[str | None, ...]:
        return tuple(layer.name for layer in self.layers)

    @property
    def max_dilation(self) -> int:
        """The largest dilation that the pattern may hold, not the largest that it holds."""
        return largest_dilation(self.kernel, self.base_kernel)

    @property
    def candidates(self) -> tuple[Dilation, ...]:
        """Every dilation that the pattern may hold, row by row: (1, 1), (1, 2), ..."""
        side = range(1, self.max_dilation + 1)
        return tuple((dy, dx) for dy in side for dx in side)

    def summary(self) -> str:
        """A text table: one line per layer, one per stage, one for the whole network."""
        return summarise(self)

    def bind(self, layers: Sequence[tuple[str, int]]) -> DilationPattern:
        """The same pattern with the names of a network's layers.

        Layers are matched by name when pattern and network share names, else in module order.

        Args:
            layers: name and units of each searchable layer of the network, in module order.

        Raises:
            ValueError: number of layers, names or units disagree.
        """
        units = dict(layers)
        known = [name for name in self.names if name in units]
        if known and (odd := set(self.names) ^ set(units)):
            name = min(map(str, odd))
            lacks = "is not in the pattern" if name in units else "is not a searchable layer of the network"
            raise ValueError(
                f"{self._where()}layer {name} {lacks}: it was found for another network or filter"
            )
        if len(self.layers) != len(layers):
            raise ValueError(
                f"{self._where()}the pattern has {len(self.layers)} layers, "
                f"the network {len(layers)} searchable ones"
            )
        names = known or [name for name, _ in layers]
        for name, layer in zip(names, self.layers, strict=True):
            if layer.units != units[name]:
                raise ValueError(
                    f"{self._where()}layer {name}: counts must sum to {units[name]}, got {layer.units}"
                )
        bound = (replace(layer, name=name) for name, layer in zip(names, self.layers, strict=True))
        return replace(self, layers=tuple(bound))

    def _where(self) -> str:
        return f"{self.source}: " if self.source else ""


def _check_dilation(dilation: Any, where: str) -> None:
    pair = isinstance(dilation, tuple) and len(dilation) == 2
    if not pair or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in dilation):
        raise ValueError(f"{where}a dilation must be a pair of positive integers (dy, dx), got {dilation!r}")


def _counted(counts: Mapping[Dilation, int]) -> str:
    return ", ".join(f"{dilation}: {count}" for dilation, count in sorted(counts.items()))
