# SPDX-License-Identifier: Apache-2.0
"""How the processes of a distributed search share what second moments cost, without a trace in the result.

Whole layers are shared, not images: each layer's sums are added up by one process, in the order in which a
single process adds them. So every digit is the same, which sums of partial sums would not be, and each
process holds its layers' moments alone. The forward passes are not shared: they are a quarter of the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


def owners(layers: Iterable[str]) -> dict[str, int]:
    """The process that a layer belongs to: they take turns."""
    count = distributed.get_world_size() if _many() else 1
    return {name: index % count for index, name in enumerate(layers)}


def own(layers: Iterable[str]) -> list[str]:
    """Those of this process; all of them if it is alone."""
    rank = distributed.get_rank() if _many() else 0
    return [name for name, owner in owners(layers).items() if owner == rank]


def gathered(values: Mapping[str, T]) -> dict[str, T]:
    """What all processes found for their layers."""
    parts: list[Mapping[str, T]] = [values]
    if _many():
        parts *= distributed.get_world_size()
        distributed.all_gather_object(parts, values)
    return {name: value for part in parts for name, value in part.items()}


def send(tensors: Iterable[Tensor], owner: int) -> None:
    """Overwrites tensors with the owner's."""
    for tensor in tensors if _many() else ():
        distributed.broadcast(tensor, owner)


def _many() -> bool:
    return distributed.is_available() and distributed.is_initialized()
