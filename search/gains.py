# SPDX-License-Identifier: Apache-2.0
"""What a trained plain network would gain from dilations, by the gradients of its loss.

Legend: N images, O output channels, G groups, c input channels of a group, K size of the large kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from search._correlator import Correlator, phases_of
from search.assign import unit_errors
from search.space import DilationSpace

if TYPE_CHECKING:
    from search.strategies.base import PlainTask

MERGED_IMAGES = 32  # whose maps are correlated together


@dataclass(frozen=True)
class Gains:
    """What the units of a layer would gain.

    Attributes:
        gain: (units, candidates): squared gradient on a candidate's taps, times the channel's squared norm,
            which together do not depend on the scale that a batch norm removes.
        size: of the output map, by which layers form stages.
    """

    gain: NDArray[np.float64]
    size: tuple[int, int]


def measure_gains(plain: PlainTask, space: DilationSpace, units: Mapping[str, int]) -> dict[str, Gains]:
    """The gains of every layer, from one forward and backward pass per batch.

    Raises:
        ValueError: there is no batch, a layer is not run, or an involution is among the layers.
    """
    layers: dict[str, nn.Conv2d] = {}
    for name in units:
        layer = plain.network.get_submodule(name)
        if not isinstance(layer, nn.Conv2d):
            raise ValueError(f"{name}: the strategy gradient is for convolutions, got {type(layer).__name__}")
        layers[name] = layer
    sums: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, int]] = {}
    waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(name: str) -> None:
        x, gradient = (torch.cat(parts) for parts in zip(*waiting.pop(name), strict=True))
        layer = layers[name]
        stride, groups = (layer.stride[0], layer.stride[1]), layer.groups
        shape = space.kernel**2, groups, layer.out_channels // groups, layer.in_channels // groups
        sizes[name] = gradient.shape[2], gradient.shape[3]
        correlator = Correlator(phases_of(x, stride), gradient, space.kernel // 2, groups)
        correlator.add_cross(sums.setdefault(name, x.new_zeros(shape)), space.kernel, stride)

    for batch in plain.samples():
        for name, x, gradient in _gradients(plain, layers, batch):
            # A correlation costs nearly the same for any number of images.
            held = waiting.get(name)
            if held and (held[0][0].shape[1:] != x.shape[1:] or len(held) * len(x) >= MERGED_IMAGES):
                add(name)
            waiting.setdefault(name, []).append((x, gradient))
    for name in list(waiting):
        add(name)
    for name in units:
        if name not in sums:
            raise ValueError(f"{name}: no batch of the calibration data ran this layer")
    return {name: Gains(_gain(sums[name], layers[name], space, units[name]), sizes[name]) for name in units}


def _gain(gradient: Tensor, layer: nn.Conv2d, space: DilationSpace, units: int) -> NDArray[np.float64]:
    """(K * K, G, O / G, c) -> (units, candidates)"""
    power = gradient.double().square().sum(3).flatten(1).T.cpu()  # (O, K * K)
    norm = layer.weight.detach().double().square().sum((1, 2, 3)).cpu()
    taken = power[:, space.taps].sum(2) - power[:, space.kernel**2 // 2, None]  # all share the centre
    # Rounding differs between machines by an ulp or so; ties must not.
    found = unit_errors(taken * norm[:, None], units)
    return np.round(found / max(found.max(), np.finfo(np.float64).tiny), 9)


def _gradients(
    plain: PlainTask, layers: Mapping[str, nn.Conv2d], batch: Any
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Name, input and gradient of the output of each run of a layer, in evaluation mode."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def keep(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()  # a frozen stage's
            seen.append((name, inputs[0].detach(), output))
            return output.clone()  # what follows may change it in place

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    modes = {module: module.training for module in plain.model.modules()}
    plain.model.eval()
    try:
        with torch.enable_grad():
            loss = plain.loss(plain.model, batch)
            outputs = [output for *_, output in seen]
            found = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else ()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return [
        (name, x, gradient.detach())
        for (name, x, _), gradient in zip(seen, found, strict=True)
        if gradient is not None
    ]
