# SPDX-License-Identifier: Apache-2.0
"""Search strategies, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from search.strategies.base import PlainTask, SearchTask, Strategy
from search.strategies.edo import EDOStrategy, edo
from search.strategies.gradient import GradientStrategy
from search.strategies.hand import HandStrategy
from search.strategies.pareto import FrontMember, ParetoOptions, ParetoStrategy, knee
from search.strategies.random import RandomStrategy
from search.strategies.uniform import UniformStrategy

STRATEGIES: Mapping[str, type[Strategy]] = MappingProxyType(
    {
        cls.name: cls
        for cls in (
            EDOStrategy,
            RandomStrategy,
            UniformStrategy,
            HandStrategy,
            ParetoStrategy,
            GradientStrategy,
        )
    }
)

__all__ = [
    "STRATEGIES",
    "EDOStrategy",
    "FrontMember",
    "GradientStrategy",
    "HandStrategy",
    "ParetoOptions",
    "ParetoStrategy",
    "PlainTask",
    "RandomStrategy",
    "SearchTask",
    "Strategy",
    "UniformStrategy",
    "edo",
    "knee",
]
