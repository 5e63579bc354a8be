# SPDX-License-Identifier: Apache-2.0
"""The dilation search: grow a network into a supernet, train it, find each channel's dilation."""

from search.in_training import narrow
from search.refit import warm_start
from search.space import DilationSpace
from search.strategies import STRATEGIES, SearchTask, Strategy, edo
from search.supernet import convert_to_supernet

__all__ = [
    "STRATEGIES",
    "DilationSpace",
    "SearchTask",
    "Strategy",
    "convert_to_supernet",
    "edo",
    "narrow",
    "warm_start",
]
