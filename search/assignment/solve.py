# SPDX-License-Identifier: Apache-2.0
"""Assignment under limits with a certified gap: a good one first, then proof that little can be saved.

Legend: U units, D candidates, P branches of a set.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from search.assignment.bounds import Bound, dual_ascent
from search.assignment.limits import UnitLimits
from search.assignment.sets import SetTree
from search.assignment.sizes import by_bound
from search.assignment.transport import Errors, Indices, Transport, assign_to

SIZES_TRIED = 200  # of one set


@dataclass(frozen=True)
class Solution:
    """An assignment and how good it is.

    Attributes:
        candidate: (U,), the candidate of each unit.
        total: the sum of the units' errors.
        bound: no assignment within the limits has a smaller total.
    """

    candidate: Indices
    total: float
    bound: float

    @property
    def gap(self) -> float:
        """How much smaller the least total may be, as a share of this one."""
        return max(0.0, 1 - self.bound / self.total) if self.total > 0 else 0.0


def solve(errors: Errors, limits: UnitLimits, tolerance: float = 0.005, effort: float = 4e9) -> Solution:
    """The assignment of least total error within the limits, certified to `tolerance` where effort suffices.

    Args:
        errors: (U, D), not negative.
        limits: sizes and number of the branches.
        tolerance: gap at which the search ends.
        effort: most elementary operations in a pass over the sets; a count and no time, so that the result
            does not depend on the machine's load.
    """
    best = errors.argmin(axis=1)
    if limits.allow(np.bincount(best)):
        total = float(errors.min(axis=1).sum())
        return Solution(best, total, total)
    return _Solver(np.ascontiguousarray(errors.T), limits, tolerance).run(effort)


class _Solver:
    """Holds the best assignment so far.

    Args:
        errors: (D, U).
    """

    def __init__(self, errors: Errors, limits: UnitLimits, tolerance: float) -> None:
        self.errors, self.limits, self.tolerance = errors, limits, tolerance
        self.most = min(limits.most_open, len(errors))
        self.total, self.candidate = np.inf, np.zeros(errors.shape[1], dtype=np.int64)

    def run(self, effort: float) -> Solution:
        everything = np.arange(len(self.errors))
        transport, rows = self.place(swap_search(self.errors, self.most))
        root = self.ascend(everything, transport, rows, steps=200)
        self.place(swap_search(self.errors, self.most, np.argsort(root.savings, kind="stable")))
        bound = root.value
        if bound < self.goal:
            bound = max(bound, self.prove(root, effort))
        return Solution(self.candidate, self.total, min(bound, self.total))

    @property
    def goal(self) -> float:
        """A bound that is good enough."""
        return self.total * (1 - self.tolerance)

    def prove(self, root: Bound, effort: float) -> float:
        """Looks into every set of branches that may hold something better; returns a bound."""
        if self.most == len(self.errors):
            return self.refine(np.arange(self.most), root.value)
        tree = SetTree(self.errors, root, np.unique(self.candidate), self.most)
        for slack in (1, 10):
            found = tree.search(self.total * (1 - slack * self.tolerance), effort)
            if found is not None:
                bound, sets = found
                for value, rows in sets:
                    bound = min(bound, self.refine(rows, value) if value < self.goal else value)
                return bound
        return -np.inf

    def refine(self, rows: Indices, bound: float) -> float:
        """A better bound for one set of branches, and the best assignment to them if it may be the best."""
        transport, rows = self.place(rows)
        dual = self.ascend(rows, transport, rows, steps=100)
        bound = max(bound, dual.value)
        if bound >= self.goal:
            return bound
        errors = self.errors[rows]
        free = Transport(errors)
        least = np.inf
        for value, sizes in islice(by_bound(errors, self.limits, dual), SIZES_TRIED):
            if value >= self.goal:
                return max(bound, min(least, value))
            exact = free.copy().resize(sizes)
            self.keep(exact, rows)
            least = min(least, exact.total)
            bound = max(bound, min(least, value))
        return bound

    def place(self, rows: Indices) -> tuple[Transport, Indices]:
        """Assigns all units to some of these candidates."""
        rows = np.sort(rows[: self.most])
        transport = assign_to(self.errors[rows], self.limits)
        self.keep(transport, rows)
        return transport, rows

    def keep(self, transport: Transport, rows: Indices) -> None:
        if transport.total < self.total:
            self.total, self.candidate = transport.total, rows[transport.branch]

    def ascend(self, among: Indices, transport: Transport, rows: Indices, steps: int) -> Bound:
        """The best bound for assignments to these candidates, from the prices of a known one to `rows`."""
        start = transport.errors[transport.branch, np.arange(len(transport.branch))]
        start = start - transport.prices()[transport.branch]
        return dual_ascent(self.errors[among], self.limits, self.most, self.total, start, steps, self.goal)


def swap_search(errors: Errors, count: int, start: Indices | None = None) -> Indices:
    """The `count` candidates that serve the units well, sizes aside: greedy, then swaps while they pay.

    Args:
        errors: (D, U).
        start: candidates to begin with; the first `count` are taken.
    """
    chosen = [] if start is None else start[:count].tolist()
    nearest = errors[chosen].min(axis=0, initial=errors.max())
    while len(chosen) < count:
        sums = np.minimum(nearest, errors).sum(axis=1)
        sums[chosen] = np.inf
        chosen.append(int(sums.argmin()))
        nearest = np.minimum(nearest, errors[chosen[-1]])
    while True:
        best = (float(errors[chosen].min(axis=0).sum()) - 1e-9, -1, -1)
        for place in range(count):
            others = errors[chosen[:place] + chosen[place + 1 :]].min(axis=0, initial=errors.max())
            sums = np.minimum(others, errors).sum(axis=1)
            best = min(best, (float(sums.min()), place, int(sums.argmin())))
        if best[1] < 0:
            return np.array(chosen)
        chosen[best[1]] = best[2]
