# SPDX-License-Identifier: Apache-2.0
"""What a search strategy is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ic_conv.convert import searchable_layers, units_of
from ic_conv.pattern import DilationPattern
from search.space import DilationSpace
from search.supernet import space_of, super_layers


@dataclass(frozen=True)
class PlainTask:
    """A trained plain network within the task that it was trained for.

    Args:
        model: the whole of it, network and head.
        network: the network in it, whose layers are searched.
        samples: gives batches with their targets; called once per pass.
        loss: of the model, or of a copy with a pattern, on such a batch.
    """

    model: nn.Module
    network: nn.Module
    samples: Callable[[], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class SearchTask:
    """Everything that a strategy may look at.

    Args:
        space: the candidate dilations.
        units: name and units (channels, or groups of a grouped layer) of each layer, in module order.
        seed: seed of every random choice.
        supernet: the trained supernet, for strategies with `needs_supernet`.
        batches: gives the calibration batches; called once per pass.
        plain: the trained plain network, for strategies with `needs_plain`.
    """

    space: DilationSpace
    units: Mapping[str, int]
    seed: int = 0
    supernet: nn.Module | None = None
    batches: Callable[[], Iterable[Tensor]] = field(default=lambda: ())
    plain: PlainTask | None = None

    @classmethod
    def of(cls, supernet: nn.Module, batches: Iterable[Any] = (), seed: int = 0) -> SearchTask:
        """The task of finding the pattern of a supernet."""
        units = {name: units_of(layer) for name, layer in super_layers(supernet).items()}
        return cls(space_of(supernet), units, seed, supernet, lambda: batches)

    @classmethod
    def of_plain(cls, plain: PlainTask, space: DilationSpace, seed: int = 0) -> SearchTask:
        """The task of finding the pattern of a trained plain network."""
        layers = searchable_layers(plain.network, space.base_kernel)
        if not layers:
            size = f"{space.base_kernel}x{space.base_kernel}"
            raise ValueError(
                f"no searchable layer: the network has no {size} convolution with dilation 1, 'same' padding"
            )
        return cls(space, {name: units_of(layer) for name, layer in layers.items()}, seed, plain=plain)

    def rng(self, layer: int) -> np.random.Generator:
        """A generator of its own for each layer, so that layers do not depend on each other's draws."""
        return np.random.default_rng([self.seed, layer])


class Strategy(ABC):
    """Finds a pattern. Options are constructor arguments with defaults; a strategy holds no other state."""

    name: ClassVar[str]
    needs_supernet: ClassVar[bool] = False
    needs_plain: ClassVar[bool] = False

    def check(self, task: SearchTask) -> None:  # noqa: B027 (most strategies suit every task)
        """Called before any work starts; raises ValueError if the options do not suit the task."""

    @abstractmethod
    def search(self, task: SearchTask) -> DilationPattern:
        """Returns one named LayerPattern per layer of the task; the same task gives the same pattern."""
