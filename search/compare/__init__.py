# SPDX-License-Identifier: Apache-2.0
"""Does a found pattern pay? Every method trains the same small network, on several seeds.

Finished runs lie as JSON files in the work folder, so that an interrupted comparison goes on where it was.
"""

from search.compare.catalogue import Method, methods, pattern_of
from search.compare.finders import shuffled
from search.compare.runs import compare, run, with_cost, with_needs
from search.compare.setting import PLAIN, SUPERNET, CompareOptions, slim_resnet, trained
from search.compare.show import draw, table

__all__ = [
    "PLAIN",
    "SUPERNET",
    "CompareOptions",
    "Method",
    "compare",
    "draw",
    "methods",
    "pattern_of",
    "run",
    "shuffled",
    "slim_resnet",
    "table",
    "trained",
    "with_cost",
    "with_needs",
]
