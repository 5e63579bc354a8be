# SPDX-License-Identifier: Apache-2.0
"""Every set of branches that may hold a better assignment: a tree of sets, cut by two bounds.

Sizes aside, a set's error is the sum over the units of their least error within it. What a candidate adds
to a set shrinks as the set grows, so the best gains of single candidates bound the gain of several; high
errors are capped, which keeps this bound true and sharpens it. The second bound, of the Lagrangian
relaxation, sees the sizes. The first cuts where candidates resemble each other, the second where few matter.

Legend: U units, D candidates, B size of the sets, N sets of a block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from search.assignment.bounds import Bound
from search.assignment.transport import Errors, Indices

BLOCK = 256  # sets that grow at once: few enough that their rows stay in the cache
ROUNDING = 1e-5  # sums of float32, relative


class SetTree:
    """The sets of B of D candidates, searched in blocks.

    Args:
        errors: (D, U).
        bound: Lagrangian bound of the whole problem.
        first: candidates that come first; a good set makes the tree small.
        size: B, less than D.
    """

    def __init__(self, errors: Errors, bound: Bound, first: Indices, size: int) -> None:
        by_savings = np.argsort(bound.savings, kind="stable")
        self.order = np.concatenate([first, by_savings[~np.isin(by_savings, first)]])
        self.errors = errors[self.order].astype(np.float32)
        self.size, self.constant, self.savings = size, bound.constant, bound.savings[self.order]
        caps = bound.multipliers.clip(0)
        # a unit that few branches are left to serve may pay more
        self.caps = [(caps * size / left).astype(np.float32) for left in range(1, size + 1)]
        self.ones = np.ones(errors.shape[1], dtype=np.float32)
        self.rest = [_best_later(self.savings[None], left)[0] for left in range(1, size + 1)]

    def search(self, goal: float, effort: float) -> tuple[float, list[tuple[float, Indices]]] | None:
        """The sets whose bound is below the goal, best first, and the least bound of all others.

        Args:
            goal: bounds of this size end a branch of the tree.
            effort: most elementary operations.

        Returns:
            None when the effort did not suffice.
        """
        nearest = self.errors.max(axis=0)[None]
        blocks = [(np.zeros((1, 0), dtype=np.intp), nearest, np.zeros(1))]
        least, found = np.inf, []
        while blocks:
            sets, nearest, saved = blocks.pop()
            later = np.arange(len(self.order)) > sets.max(axis=1, initial=-1)[:, None]
            effort -= later.sum() * nearest.shape[1]
            if effort < 0:
                return None
            bounds = np.where(later, self._bounds(sets, nearest, saved, later), np.inf)
            least = min(least, float(bounds[bounds >= goal].min(initial=np.inf)))
            parents, added = np.nonzero(bounds < goal)
            grown = np.concatenate([sets[parents], added[:, None]], axis=1)
            if grown.shape[1] == self.size:
                found += [
                    (float(bounds[p, a]), self.order[row])
                    for p, a, row in zip(parents, added, grown, strict=True)
                ]
                continue
            for at in range(0, len(parents), BLOCK):
                p, a = parents[at : at + BLOCK], added[at : at + BLOCK]
                blocks.append(
                    (
                        grown[at : at + BLOCK],
                        np.minimum(nearest[p], self.errors[a]),
                        saved[p] + self.savings[a],
                    )
                )
        return least, sorted(found, key=lambda item: item[0])

    def _bounds(
        self, sets: Indices, nearest: NDArray[np.float32], saved: Errors, later: NDArray[np.bool_]
    ) -> Errors:
        """Bound of what grows from each set with each later candidate: (N, D)."""
        left = self.size - sets.shape[1]
        if left > 1:
            nearest = np.minimum(nearest, self.caps[left - 1])
        before = (nearest @ self.ones).astype(np.float64)[:, None]
        after = np.repeat(before, len(self.order), axis=1)
        for candidate in np.flatnonzero(later.any(axis=0)):
            rows = later[:, candidate]
            mine = nearest if rows.all() else nearest[rows]
            after[rows, candidate] = np.minimum(mine, self.errors[candidate]) @ self.ones
        gains = after - before  # not positive, as the savings are
        by_gains = after + _best_later(gains, left)
        by_savings = self.constant + saved[:, None] + self.savings + self.rest[left - 1]
        bounds = np.maximum(by_gains * (1 - ROUNDING), by_savings)
        bounds[:, len(self.order) - left + 1 :] = np.inf  # too few candidates follow
        return bounds


def _best_later(gains: Errors, left: int) -> Errors:
    """Sum of the `left` - 1 least of the gains that stand behind each: (N, D) to (N, D)."""
    sums = np.zeros_like(gains)
    if left == 1:
        return sums
    best = np.zeros((len(gains), left - 1))
    rows = np.arange(len(gains))
    for candidate in range(gains.shape[1] - 1, -1, -1):
        sums[:, candidate] = best.sum(axis=1)
        worst = best.argmax(axis=1)
        best[rows, worst] = np.minimum(best[rows, worst], gains[:, candidate])
    return sums
