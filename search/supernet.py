# SPDX-License-Identifier: Apache-2.0
"""The supernet: the same network with every base kernel grown, so that it holds all dilations at once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ic_conv.convert import replace_modules, searchable_layers, units_of
from ic_conv.layers import Involution2d
from search.space import DilationSpace

logger = logging.getLogger(__name__)
Init = Literal["default", "inflate"]


class SuperConv2d(nn.Conv2d):
    """A convolution whose base kernel was grown; the search finds it by its type.

    Attributes:
        base_kernel: size of the kernel that it stands for.
    """

    base_kernel: int

    @classmethod
    def grow(cls, conv: nn.Conv2d, space: DilationSpace, init: Init) -> SuperConv2d:
        """A grown copy with the same output size, stride, groups, bias, dtype, device and mode."""
        grown = cls(
            conv.in_channels,
            conv.out_channels,
            space.kernel,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=space.kernel // 2,
            groups=conv.groups,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        grown.base_kernel = space.base_kernel
        if init == "inflate":
            margin = (space.kernel - space.base_kernel) // 2
            with torch.no_grad():
                grown.weight.copy_(nn.functional.pad(conv.weight, [margin] * 4))
        if conv.bias is not None and grown.bias is not None:
            grown.bias.data.copy_(conv.bias)
            grown.bias.requires_grad_(conv.bias.requires_grad)
        grown.weight.requires_grad_(conv.weight.requires_grad)
        return grown.train(conv.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base_kernel={self.base_kernel}"


class SuperInvolution2d(Involution2d):
    """An involution whose window was grown; see SuperConv2d."""

    base_kernel: int

    @classmethod
    def grow(cls, layer: Involution2d, space: DilationSpace, init: Init) -> SuperInvolution2d:
        """A grown copy; the reducing half of the kernel generation is taken over."""
        weight = next(layer.conv2.parameters())
        grown = cls(
            layer.channels,
            space.kernel,
            layer.stride,
            layer.group_channels,
            layer.reduction,
            layer.kernel_generation,
            backend=layer.backend,
            device=weight.device,
            dtype=weight.dtype,
        )
        grown.base_kernel = space.base_kernel
        grown.conv1 = layer.conv1
        if init == "inflate":
            margin = (space.kernel - space.base_kernel) // 2

            def inflated(rows: Tensor) -> Tensor:
                taps = rows.unflatten(0, (layer.groups, space.base_kernel, space.base_kernel)).movedim(0, -1)
                wide = nn.functional.pad(taps.movedim((0, 1), (-2, -1)), [margin] * 4)
                return wide.movedim((-2, -1), (0, 1)).movedim(-1, 0).flatten(0, 2)

            with torch.no_grad():
                for new, old in zip(grown.conv2.parameters(), layer.conv2.parameters(), strict=True):
                    new.copy_(inflated(old))
        for new, old in zip(grown.conv2.parameters(), layer.conv2.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        return grown.train(layer.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base_kernel={self.base_kernel}"


SuperLayer = SuperConv2d | SuperInvolution2d


def convert_to_supernet(
    model: nn.Module,
    kernel_size: int,
    *,
    base_kernel: int = 3,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    init: Init = "default",
    inplace: bool = False,
) -> nn.Module:
    """Grows every searchable layer of any network to kernel_size.

    Searchable is a convolution of exactly the base kernel with dilation 1 and 'same' zero padding, and an
    involution with such a window; strides and groups are kept.

    Args:
        model: any module. It stays untouched unless `inplace`.
        kernel_size: size of the grown kernels, odd; 9 gives 16 candidate dilations, 13 gives 36.
        base_kernel: size of the kernels that grow.
        filter_fn: called with (module, name); only layers for which it is true grow.
        init: ``"default"`` draws new weights, ``"inflate"`` puts the present ones at the centre of zeros,
            so that the supernet computes what the model did.
        inplace: change `model` itself.

    Returns:
        The supernet; the grown layers are `SuperConv2d` and `SuperInvolution2d`.

    Raises:
        ValueError: sizes that do not fit, an unknown init, or no searchable layer.
    """
    space = DilationSpace(kernel_size, base_kernel)
    if init not in get_args(Init):
        raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {init!r}")
    supernet = model if inplace else copy.deepcopy(model)
    layers = searchable_layers(supernet, base_kernel, filter_fn)
    if not layers:
        raise ValueError(
            f"no searchable layer: the network has no {base_kernel}x{base_kernel} convolution or involution "
            "with dilation 1 and 'same' zero padding that the filter lets through"
        )
    grown = {
        name: (SuperInvolution2d if isinstance(layer, Involution2d) else SuperConv2d).grow(layer, space, init)  # type: ignore[arg-type]
        for name, layer in layers.items()
    }
    logger.info("grown to %dx%d: %s", kernel_size, kernel_size, ", ".join(grown))
    return replace_modules(supernet, grown)


def super_layers(supernet: nn.Module) -> dict[str, SuperLayer]:
    """The grown layers by name, in module order."""
    return {name: module for name, module in supernet.named_modules() if isinstance(module, SuperLayer)}


def space_of(supernet: nn.Module) -> DilationSpace:
    """The search space that a supernet was made for.

    Raises:
        ValueError: it has no grown layer, or layers of several sizes.
    """
    spaces = {
        DilationSpace(layer.kernel_size[0], layer.base_kernel) for layer in super_layers(supernet).values()
    }
    if len(spaces) != 1:
        raise ValueError(f"the supernet must have grown layers of one size, got {len(spaces)} sizes")
    return spaces.pop()


def open_candidates(layer: SuperLayer) -> NDArray[np.bool_]:
    """The candidates that searches in the midst of a training left to a grown layer: those with weights on
    all their taps. A dead unit has every candidate, as has an involution, whose kernels are no constants.

    Returns:
        bool (units, candidates)
    """
    space, units = DilationSpace(layer.kernel_size[0], layer.base_kernel), units_of(layer)
    if not isinstance(layer, SuperConv2d):
        return np.ones((units, len(space.candidates)), dtype=bool)
    alive = layer.weight.detach().ne(0).flatten(2).any(1)  # (channels, K * K)
    left = alive[:, space.taps.to(alive.device)].all(2).unflatten(0, (units, -1)).any(1)
    return (left | ~left.any(1, keepdim=True)).cpu().numpy()
