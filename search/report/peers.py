# SPDX-License-Identifier: Apache-2.0
"""What other strategies' patterns lose on the statistics that a search collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def compare_peers(pattern: DilationPattern) -> list[Peer]:
    """The found pattern first, then itself shuffled within each layer, plain, and the simple strategies.

    The errors of the others are expectations: their dilations are dealt to the channels by chance. Without
    ``layer_error`` and ``candidate_error`` in the pattern's meta (the strategy edo leaves them) there is
    nothing to compare.
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
    return [
        Peer("found", pattern, tuple(found[name] for name in names)),
        *(Peer(name, other, expected_errors(other, table)) for name, other in others.items()),
    ]


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
