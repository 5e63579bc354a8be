# SPDX-License-Identifier: Apache-2.0
"""Branch sizes that run fast: channels to dilations at least error, within limits, with a certified gap."""

from search.assignment.limits import TARGETS, BranchLimits, UnitLimits
from search.assignment.solve import Solution, solve

__all__ = ["TARGETS", "BranchLimits", "Solution", "UnitLimits", "solve"]
