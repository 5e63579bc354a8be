# SPDX-License-Identifier: Apache-2.0
"""What a search in the middle of a training changes: kernels shrink, and the optimizer's state follows.

Legend: O output channels, U units, K kernel size, D candidates.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ic_conv.pattern import PLAIN, DilationPattern, LayerPattern
from search.criteria import DEFAULT_CRITERION
from search.space import DilationSpace
from search.strategies import EDOStrategy, SearchTask
from search.supernet import SuperConv2d, space_of, super_layers

logger = logging.getLogger(__name__)


def kept_counts(candidates: int, searches: int) -> list[int]:
    """Candidates that a unit keeps after each of several searches: one after the last, in equal ratios.

    Example:
        >>> kept_counts(16, 2), kept_counts(36, 3)
        ([4, 1], [11, 4, 1])
    """
    return [
        math.ceil(round(candidates ** ((searches - done) / searches), 6)) for done in range(1, searches + 1)
    ]


def tap_mask(space: DilationSpace, kept: Tensor, channels: int) -> Tensor:
    """Which taps the kept candidates (U, D) of a layer's units read: bool (O, 1, K, K)."""
    units = (kept.cpu()[:, :, None, None] & space.tap_masks()).any(1)
    return units.repeat_interleave(channels // len(units), 0).unsqueeze(1)


def narrow(
    supernet: nn.Module,
    batches: Iterable[Any],
    count: int,
    optimizers: Iterable[Optimizer] = (),
    *,
    criterion: str = DEFAULT_CRITERION,
) -> None:
    """A search in the midst of a training of your own: each channel keeps its best candidates.

    The taps that no kept candidate reads become zero and stay so. The weights adapt to what is left, and lose
    less when the last search, `search.edo`, takes one of it.

    Args:
        supernet: made by `convert_to_supernet`, in training.
        batches: calibration data, see `search.edo`.
        count: candidates that a channel keeps. Of 16, in 9x9 kernels, `tools/search.py --searches 3` leaves 7
            after a third of the training and 3 after another.
        optimizers: which step the supernet; their momentum on the taps that go is dropped.
        criterion: see `search.edo`.

    Example:
        >>> search.narrow(supernet, calibration_loader, 4, [optimizer])      # doctest: +SKIP
    """
    finder = EDOStrategy(criterion)
    shrink(supernet, finder.narrowed(SearchTask.of(supernet, batches), count), list(optimizers))


def shrink(supernet: nn.Module, kept: Mapping[str, NDArray[np.bool_]], optimizers: list[Optimizer]) -> None:
    """Sets the taps that no kept candidate reads to zero, now and in the training to come.

    Args:
        supernet: in training.
        kept: bool (units, candidates) by layer.
        optimizers: which step it.
    """
    space, layers = space_of(supernet), super_layers(supernet)
    for name, each in kept.items():
        if isinstance(layer := layers[name], SuperConv2d):
            mask_weight(layer.weight, tap_mask(space, torch.from_numpy(each), layer.out_channels), optimizers)


@torch.no_grad()
def mask_weight(weight: Tensor, mask: Tensor, optimizers: list[Optimizer]) -> None:
    """Sets a kernel's other taps to zero, now and in the training to come, whatever optimizer steps it.

    Gradient and momentum are zero there too, and zeros decay to zeros.
    """
    mask = mask.to(weight)
    weight.mul_(mask)
    for optimizer in optimizers:
        for value in optimizer.state.get(weight, {}).values():
            if _follows(value, weight):
                value.mul_(mask)
    if weight.grad is not None:
        weight.grad.mul_(mask)  # of earlier batches, while gradients accumulate
    if weight.requires_grad:
        weight.register_hook(lambda gradient: gradient * mask)


def plain_where_frozen(pattern: DilationPattern, network: nn.Module) -> DilationPattern:
    """The pattern without dilations in frozen layers, whose weights cannot learn to use them."""
    return replace(
        pattern,
        layers=tuple(
            layer
            if next(network.get_submodule(str(layer.name)).parameters()).requires_grad
            else LayerPattern.from_assignment([PLAIN] * layer.units, layer.name)
            for layer in pattern.layers
        ),
    )


def element_places(network: nn.Module, change: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """Where each parameter's elements come from when `change` permutes and crops a network's parameters.

    Args:
        network: stays untouched.
        change: called with a copy of it.

    Returns:
        By name of the changed network's parameters, places in the flattened parameter of that name.
    """
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        count = torch.arange(parameter.numel(), dtype=torch.float64, device=parameter.device)
        parameter.data = count.view(parameter.shape)
    return {name: places.detach().long() for name, places in change(twin).named_parameters()}


def follow(
    optimizer: Optimizer,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    places: Mapping[str, Tensor] | None = None,
) -> None:
    """Puts a changed network's parameters in the place of the former ones, in the same groups.

    Gradients that wait for a step are dropped.

    Args:
        optimizer: steps the parameters `before`, or some of them.
        before, after: the network's parameters by name.
        places: of `element_places`, by which values per element, such as momentum, go along; without them
            new parameters start without state. State of another shape cannot follow and starts anew.
    """
    for name, old in before.items():
        state = optimizer.state.pop(old, {})
        if places is not None and state:
            state = {key: _moved(value, old, after[name], places[name]) for key, value in state.items()}
            if None in state.values():
                logger.warning("%s: the optimizer's state does not go by elements and starts anew", name)
                state = {}
        if state and (places is not None or after[name] is old):
            optimizer.state[after[name]] = state
    new = {old: after[name] for name, old in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
    optimizer.zero_grad()


def _moved(value: object, old: nn.Parameter, new: nn.Parameter, places: Tensor) -> object:
    """One entry of a parameter's state for the new parameter; None if it cannot follow."""
    if not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != old.shape):
        return value  # the number of steps
    if not _follows(value, old):
        return None
    return torch.empty_like(new, dtype=value.dtype).copy_(value.flatten()[places.to(value.device)])


def _follows(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
