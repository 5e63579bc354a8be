# SPDX-License-Identifier: Apache-2.0
"""Which pairs of taps of dilated kernels share a sum over the output positions; see `search.autocorrelation`.

Legend: p an output position, t and u taps counted from the kernel's centre, s stride, K kernel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from search._correlator import Pair
from search.space import DilationSpace


class Slot(NamedTuple):
    """Where the sum over two taps is stored, and whether the taps are swapped there."""

    place: int
    transposed: bool


def canonical(pair: Pair, stride: int) -> Pair:
    """The pair that stands for all those with the same sum: its first tap reads the first row at p = 0."""
    first, second = (tap // stride for tap in pair)
    if min(first, second) > 0 or max(first, second) < 0:
        return pair
    return pair[0] - stride * first, pair[1] - stride * first


def nearer_pair(pair: Pair, stride: int) -> Pair | None:
    """The pair one row nearer to the centre, whose sum has one row more; None if no row is missing."""
    first, second = (tap // stride for tap in pair)
    step = stride * ((max(first, second) < 0) - (min(first, second) > 0))
    return canonical((pair[0] + step, pair[1] + step), stride) if step else None


@dataclass(frozen=True)
class TapPairs:
    """Which pairs of taps of a space's candidates share a sum.

    Attributes:
        stride: of the layer, (vertical, horizontal).
        slots: by ((ty, uy), (tx, ux)), in canonical form and in one of both orders.
    """

    stride: Pair
    slots: Mapping[tuple[Pair, Pair], int]

    @classmethod
    @cache
    def of(cls, space: DilationSpace, stride: Pair) -> TapPairs:
        steps = range(-(space.base_kernel // 2), space.base_kernel // 2 + 1)
        axes = [
            dict.fromkeys(
                canonical((d * i, d * j), along)
                for d in range(1, space.max_dilation + 1)
                for i in steps
                for j in steps
            )
            for along in stride
        ]
        slots: dict[tuple[Pair, Pair], int] = {}
        pairs = cls(stride, slots)
        waiting = [(y, x) for x in axes[1] for y in axes[0]]
        while waiting:
            key = pairs.ordered(waiting.pop())[0]
            if key not in slots:
                slots[key] = len(slots)
                if (nearer := pairs.nearer(key)) is not None:
                    waiting.append(nearer)
        return pairs

    def ordered(self, key: tuple[Pair, Pair]) -> tuple[tuple[Pair, Pair], bool]:
        """The key in the order in which it is stored, and whether that swaps its taps."""
        (ty, uy), (tx, ux) = key
        swapped = canonical((uy, ty), self.stride[0]), canonical((ux, tx), self.stride[1])
        first_phases_first = (swapped[0][0], swapped[1][0], swapped) < (ty, tx, key)
        return (swapped, True) if first_phases_first else (key, False)

    def slot(self, t: Pair, u: Pair) -> Slot:
        """Where the sum over the taps t and u, (vertical, horizontal) each, is stored."""
        y, x = (canonical((t[i], u[i]), self.stride[i]) for i in (0, 1))
        return self._stored((y, x))

    def nearer(self, key: tuple[Pair, Pair]) -> tuple[Pair, Pair] | None:
        """The key whose sum has one row, or else one column, more than that of `key`."""
        y, x = key
        if (row := nearer_pair(y, self.stride[0])) is not None:
            return row, x
        column = nearer_pair(x, self.stride[1])
        return None if column is None else (y, column)

    def missing(self) -> Iterator[tuple[int, Slot]]:
        """Slots that lack a row or column of another one, with that one; those that lack least first."""

        def lack(key: tuple[Pair, Pair]) -> int:
            return 0 if (nearer := self.nearer(key)) is None else 1 + lack(nearer)

        for key in sorted(self.slots, key=lack):
            if (nearer := self.nearer(key)) is not None:
                yield self.slots[key], self._stored(nearer)

    def _stored(self, key: tuple[Pair, Pair]) -> Slot:
        stored, swapped = self.ordered(key)
        return Slot(self.slots[stored], swapped)


def kept_rows(pair: Pair, stride: int, outputs: int, lengths: Pair) -> tuple[Pair, int]:
    """First row under each of two taps where both read the map, and the number of such rows."""
    a, b = (tap // stride for tap in pair)
    start, end = max(0, -a, -b), min(outputs, lengths[0] - a, lengths[1] - b)
    return (start + a, start + b), end - start


def lost_row(pair: Pair, stride: int, outputs: int, lengths: Pair) -> tuple[Pair, int]:
    """The row under each of two taps that the neighbouring pair has more, and 1; or 0 if it has none more."""
    a, b = (tap // stride for tap in pair)
    p = -1 if min(a, b) > 0 else outputs
    return (p + a, p + b), int(0 <= p + a < lengths[0] and 0 <= p + b < lengths[1])
