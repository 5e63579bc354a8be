# SPDX-License-Identifier: Apache-2.0
"""Search strategies, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from search.strategies.base import PlainTask, SearchTask, Strategy
from search.strategies.darts import DartsStrategy
from search.strategies.edo import EDOStrategy, edo
from search.strategies.gradient import GradientStrategy
from search.strategies.hand import HandStrategy
from search.strategies.histogram import HistogramStrategy
from search.strategies.pareto import FrontMember, ParetoOptions, ParetoStrategy, knee
from search.strategies.random import RandomStrategy
from search.strategies.rfnext import RFNextStrategy
from search.strategies.single_path import SinglePathStrategy
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
            RFNextStrategy,
            DartsStrategy,
            SinglePathStrategy,
            HistogramStrategy,
        )
    }
)

__all__ = [
    "STRATEGIES",
    "DartsStrategy",
    "EDOStrategy",
    "FrontMember",
    "GradientStrategy",
    "HandStrategy",
    "HistogramStrategy",
    "ParetoOptions",
    "ParetoStrategy",
    "PlainTask",
    "RFNextStrategy",
    "RandomStrategy",
    "SearchTask",
    "SinglePathStrategy",
    "Strategy",
    "UniformStrategy",
    "edo",
    "knee",
]
