# SPDX-License-Identifier: Apache-2.0
"""Units into branches of given sizes at least error, and a local search over the sizes.

For given sizes this is a transportation problem. A solution is best exactly if no chain of moves between
branches saves anything (no negative cycle), and it stays so when units move along cheapest chains:
successive shortest paths (Ahuja et al., Network Flows, 1993, section 9.7) on a graph of the branches alone.

Legend: U units, P branches.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from search.assignment.limits import UnitLimits

Errors = NDArray[np.float64]
Indices = NDArray[np.int64]


class Transport:
    """A best assignment for its own branch sizes; `move` changes the sizes and keeps it best.

    Args:
        errors: (P, U).

    Attributes:
        branch: (U,), the branch of each unit; at first each has its best.
    """

    def __init__(self, errors: Errors) -> None:
        self.errors = errors
        self.branch: Indices = errors.argmin(axis=0)
        self._moves = np.empty((len(errors), len(errors)))
        for branch in range(len(errors)):
            self._update(branch)

    @property
    def sizes(self) -> Indices:
        return np.bincount(self.branch, minlength=len(self.errors))

    @property
    def total(self) -> float:
        return float(np.take_along_axis(self.errors, self.branch[None], 0).sum())

    def copy(self) -> Transport:
        other = object.__new__(Transport)
        other.errors, other.branch, other._moves = self.errors, self.branch.copy(), self._moves.copy()
        return other

    def resize(self, sizes: Indices) -> Transport:
        """Moves units until the branches have these sizes."""
        missing = sizes - self.sizes
        while missing.any():
            chain = self._cheapest_chain(missing)
            self._follow(chain)
            missing[chain[0]] += 1
            missing[chain[-1]] -= 1
        return self

    def prices(self) -> Errors:
        """What one unit more costs in each branch, up to a constant: (P,)."""
        return self.chain_costs()[int(self.sizes.argmax())]

    def chain_costs(self) -> Errors:
        """What it costs to move one unit's room from branch to branch: (P, P) (Floyd and Warshall)."""
        costs = self._moves.copy()
        for middle in range(len(costs)):
            np.minimum(costs, costs[:, middle, None] + costs[middle], out=costs)
        return costs

    def _update(self, branch: int) -> None:
        """The cheapest single move out of a branch to every other one."""
        inside = self.branch == branch
        if inside.any():
            self._moves[branch] = (self.errors[:, inside] - self.errors[branch, inside]).min(axis=1)
        else:
            self._moves[branch] = np.inf
        self._moves[branch, branch] = 0.0

    def _cheapest_chain(self, missing: Indices) -> list[int]:
        """From a branch that has too many units to one that has too few (Bellman and Ford)."""
        costs = np.where(missing < 0, 0.0, np.inf)
        before = np.full(len(costs), -1)
        while True:
            through = costs[:, None] + self._moves
            source, best = through.argmin(axis=0), through.min(axis=0)
            shorter = best < costs - 1e-12
            if not shorter.any():
                break
            np.copyto(costs, best, where=shorter)
            np.copyto(before, source, where=shorter)
        costs[missing <= 0] = np.inf
        chain = [int(costs.argmin())]
        while before[chain[0]] >= 0:
            chain.insert(0, int(before[chain[0]]))
        return chain

    def _follow(self, chain: list[int]) -> None:
        """Moves one unit along each step of the chain; all are chosen before any moves."""
        moves = []
        for at, to in pairwise(chain):
            inside = np.flatnonzero(self.branch == at)
            moves.append((inside[(self.errors[to, inside] - self.errors[at, inside]).argmin()], to))
        for unit, to in moves:
            self.branch[unit] = to
        for branch in chain:
            self._update(branch)


def assign_to(errors: Errors, limits: UnitLimits) -> Transport:
    """A good assignment to some of these branches that keeps the limits.

    Rounds the sizes of the best free assignment, then moves multiples between branches while that pays.

    Args:
        errors: (P, U), P at most the branches that the limits allow.
    """
    best = _rounded(errors, limits)
    improved = True
    while improved:
        improved = False
        sizes, margins = best.sizes, best.chain_costs()
        for source, sink, amount in _moves(sizes, margins, limits):
            changed = sizes.copy()
            changed[source] -= amount
            changed[sink] += amount
            if not limits.allow(changed):
                continue
            other = best.copy().resize(changed)
            if other.total < best.total - 1e-9:
                best, improved = other, True
                break
    return best


def _moves(sizes: Indices, margins: Errors, limits: UnitLimits) -> list[tuple[int, int, int]]:
    """Moves (source, sink, amount) that may pay, most promising first; costs are convex in the amount."""
    amounts = {limits.multiple, limits.remainder, max(limits.least, limits.multiple)} - {0}
    found = [
        (margins[source, sink] * amount, source, sink, amount)
        for source in np.flatnonzero(sizes)
        for sink in range(len(sizes))
        for amount in amounts | {int(sizes[source])}
        if margins[source, sink] < -1e-12 and amount <= sizes[source]
    ]
    return [(int(source), int(sink), int(amount)) for _, source, sink, amount in sorted(found)]


def _rounded(errors: Errors, limits: UnitLimits) -> Transport:
    """The free assignment with its sizes rounded; branches that are too small close, the smallest first."""
    rows = np.arange(len(errors))
    while True:
        free = Transport(errors[rows])
        sizes = round_sizes(free.sizes, limits)
        if sizes is not None:
            break
        rows = np.delete(rows, free.sizes.argmin())
    free.resize(sizes)
    if len(rows) == len(errors):
        return free
    whole = Transport(errors)
    whole.branch = rows[free.branch]
    for branch in range(len(errors)):
        whole._update(branch)
    return whole


def round_sizes(sizes: Indices, limits: UnitLimits) -> Indices | None:
    """Sizes near these that keep the limits (largest remainder); None: too many or too small branches."""
    there = np.flatnonzero(sizes)
    least = -(-limits.least // limits.multiple) * limits.multiple
    if len(there) > limits.most:
        return None
    if len(there) == 1:
        return np.where(sizes > 0, limits.units, 0)
    rounded = np.zeros_like(sizes)
    rounded[there] = np.maximum(sizes[there] // limits.multiple * limits.multiple, least)
    # the remainder goes where it is missed most
    rounded[there[(sizes - rounded)[there].argmax()]] += limits.remainder
    while (left := limits.units - rounded.sum()) != 0:
        lack = (sizes - rounded).astype(float)
        if left > 0:
            lack[sizes == 0] = -np.inf
            rounded[lack.argmax()] += limits.multiple
        else:
            lack[rounded < least + limits.multiple] = np.inf
            if np.isinf(lack.min()):
                return None
            rounded[lack.argmin()] -= limits.multiple
    return rounded
