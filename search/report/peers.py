# SPDX-License-Identifier: Apache-2.0
"""What other strategies' patterns lose on the statistics that a search collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ic_conv.pattern import DilationPattern, LayerPattern
from search.space import DilationSpace
from search.strategies import STRATEGIES, SearchTask

PEERS = ("hand", "uniform", "random")


@dataclass(frozen=True)
class Peer:
    """A pattern and its mean criterion error in each layer."""

    name: str
    pattern: DilationPattern
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """Mean over all units."""
        return float(np.average(self.errors, weights=[layer.units for layer in self.pattern.layers]))


@dataclass(frozen=True)
class Comparison:
    """What a report compares its pattern with besides the simple strategies.

    Attributes:
        patterns: for the same layers, by name.
        table: rows of cells, the first of them the heading.
        options: of the command that makes the page again.
    """

    patterns: Mapping[str, DilationPattern] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()
    options: Sequence[str] = ()

    @classmethod
    def read(cls, patterns: Sequence[str], table: str | None = None) -> Comparison:
        """From pattern files and the file that ``tools/compare.py --output`` wrote.

        Raises:
            ValueError: one of them is something else.
            OSError: one of them cannot be read.
        """
        options = ["--patterns", *patterns] if patterns else []
        rows: list[list[str]] = []
        if table is not None:
            options += ["--table", table]
            lines = Path(table).read_text(encoding="utf-8").splitlines()
            rows = [
                [cell.strip() for cell in line.strip().strip("|").split("|")]
                for line in lines
                if line.startswith("|") and not set(line) <= set("|-: ")
            ]
            if len(rows) < 2 or len({len(row) for row in rows}) != 1:
                raise ValueError(f"{table} must hold one table, as `tools/compare.py --output` writes it")
        return cls({Path(name).stem: DilationPattern.load(name) for name in patterns}, rows, options)


def compare_peers(pattern: DilationPattern, given: Mapping[str, DilationPattern] | None = None) -> list[Peer]:
    """The found pattern first, then itself shuffled within each layer, plain, the simple strategies.

    The errors of the others are expectations: their dilations are dealt to the channels by chance. Without
    ``layer_error`` and ``candidate_error`` in the pattern's meta (the strategy edo leaves them) there is
    nothing to compare.

    Args:
        pattern: found by the strategy edo.
        given: more patterns for the same layers, by the name to show.

    Raises:
        ValueError: a given pattern is for other layers, or has larger dilations.
    """
    found, table = pattern.meta.get("layer_error"), pattern.meta.get("candidate_error")
    if found is None or table is None:
        return []
    names = [str(name) for name in pattern.names]
    task = SearchTask(
        DilationSpace(pattern.kernel, pattern.base_kernel),
        {name: layer.units for name, layer in zip(names, pattern.layers, strict=True)},
        seed=pattern.meta.get("seed", 0),
    )
    plain = tuple(LayerPattern.plain(layer.units, layer.name) for layer in pattern.layers)
    others = {
        "found, shuffled": pattern,
        "plain": DilationPattern(plain, pattern.kernel, pattern.base_kernel),
        **{name: STRATEGIES[name]().search(task) for name in PEERS},
    }
    for name, other in (given or {}).items():
        try:
            others[name] = replace(other.bind(list(task.units.items())), kernel=pattern.kernel)
        except ValueError as error:
            raise ValueError(f"{name} does not suit the layers of this search: {error}") from error
    return [
        Peer("found", pattern, tuple(found[name] for name in names)),
        *(Peer(name, other, expected_errors(other, table)) for name, other in others.items()),
    ]


def criteria_errors(pattern: DilationPattern) -> dict[str, float]:
    """Mean error over all units of what other criteria choose on the same statistics, by their names."""
    units = [layer.units for layer in pattern.layers]
    return {
        name: float(np.average([errors[str(layer)] for layer in pattern.names], weights=units))
        for name, errors in pattern.meta.get("criteria_error", {}).items()
    }


def expected_errors(
    pattern: DilationPattern, candidate_error: Mapping[str, Sequence[float]]
) -> tuple[float, ...]:
    """Mean error of each layer when its dilations are dealt to the channels by chance."""
    place = {dilation: index for index, dilation in enumerate(pattern.candidates)}
    return tuple(
        sum(count * candidate_error[str(layer.name)][place[dilation]] for dilation, count in layer.branches)
        / layer.units
        for layer in pattern.layers
    )
