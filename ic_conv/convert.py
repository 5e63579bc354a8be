# SPDX-License-Identifier: Apache-2.0
"""From a network and a dilation pattern to the network that uses the pattern."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from ic_conv._channels import ChannelGraph, Destinations, is_conv2d, own_tensors
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.layers.involution2d import Involution2d
from ic_conv.pattern import DilationPattern, LayerPattern

logger = logging.getLogger(__name__)
Filter = Callable[[nn.Module, str], bool]


def searchable_layers(
    model: nn.Module, base_kernel: int = 3, filter_fn: Filter | None = None
) -> dict[str, nn.Conv2d | Involution2d]:
    """The layers whose dilations can be searched, by name and in module order; shared ones once.

    They are convolutions with exactly the base kernel, dilation 1 and 'same' zero padding, and involutions
    with such a window. Subclasses that compute something else than `torch.nn.Conv2d` are left out.

    Args:
        model: any module.
        base_kernel: kernel size, odd.
        filter_fn: called with (module, name); only layers for which it is true are taken.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if _is_plain(module, base_kernel) and (filter_fn is None or filter_fn(module, name))
    }


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """Puts each new module wherever the one of that name stands, under its other names too.

    Returns:
        The model, or the new module if the model itself was replaced (name "").
    """
    old = dict(model.named_modules())
    by_old = {old[name]: module for name, module in new.items()}
    for parent in old.values():
        for key, child in parent._modules.items():
            if child in by_old:
                parent.register_module(key, by_old[child])
    return new.get("", model)


def apply_pattern(
    model: nn.Module, pattern: DilationPattern, *, filter_fn: Filter | None = None, inplace: bool = False
) -> nn.Module:
    """Replaces a network's searchable convolutions by inception convolutions; involutions get dilations too.

    The network is a plain one, whose weights are kept, or the supernet on which the pattern was found: then
    each channel keeps those taps of its large kernel that its dilation selects. If the pattern knows which
    channel has which dilation, channels keep their meaning: they are put in branch order together with the
    batch norms and convolutions that read them where the network's graph allows, and elsewhere the layer puts
    its output back into the original order.

    Args:
        model: any module. It stays untouched unless `inplace`.
        pattern: bound to the searchable layers by name, or in module order when it has no names.
        filter_fn: called with (module, name); only layers for which it is true are searchable. Give the one
            that the search used.
        inplace: change `model` itself.

    Returns:
        The network with `ICConv2d` layers of the same dtype, device, mode and requires_grad.

    Raises:
        ValueError: nothing to convert, or the pattern's layers, names or counts do not fit the network.

    Example:
        >>> net = apply_pattern(torchvision.models.resnet50(), DilationPattern.load("ic_resnet50_k9.json"))
    """
    network = model if inplace else copy.deepcopy(model)
    layers = {
        name: module
        for name, module in network.named_modules()
        if (
            _is_plain(module, pattern.base_kernel)
            or (name in pattern.names and _is_plain(module, pattern.kernel))
        )
        and (filter_fn is None or filter_fn(module, name))
    }
    if not layers:
        raise ValueError(
            "no layer to convert: the network has no convolution or involution that the filter lets through "
            f"with a {pattern.base_kernel}x{pattern.base_kernel} kernel, dilation 1 and 'same' zero padding"
        )
    bound = pattern.bind([(name, units_of(layer)) for name, layer in layers.items()])
    chosen = {str(layer.name): layer for layer in bound.layers}
    convs = {name: layer for name, layer in chosen.items() if isinstance(layers[name], nn.Conv2d)}
    leftovers = _arrange(network, convs)
    new: dict[str, nn.Module] = {}
    for name, layer in chosen.items():
        old = layers[name]
        if isinstance(old, Involution2d):
            new[name] = _dilate(old, layer, pattern.base_kernel)
        else:
            new[name] = _convert(old, layer, pattern.base_kernel, leftovers.get(name, {}))
    logger.info("layers with a dilation pattern: %s", ", ".join(new))
    if leftovers:
        logger.info("outputs put back into the original channel order: %s", ", ".join(leftovers))
    return replace_modules(network, new)


def _is_plain(module: nn.Module, kernel: int) -> TypeGuard[nn.Conv2d | Involution2d]:
    """Whether it is a layer of this kernel size with dilation 1 and 'same' zero padding."""
    if isinstance(module, Involution2d):
        return module.kernel_size == (kernel, kernel) and module.group_dilations is None
    return (
        is_conv2d(module)
        and module.kernel_size == (kernel, kernel)
        and module.dilation == (1, 1)
        and module.padding in ("same", (kernel // 2, kernel // 2))
        and module.padding_mode == "zeros"
    )


def units_of(layer: nn.Conv2d | Involution2d) -> int:
    """What a pattern counts in this layer: output channels, or the groups of a grouped layer."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) and layer.groups == 1 else layer.groups


def _arrange(network: nn.Module, chosen: Mapping[str, LayerPattern]) -> dict[str, dict[str, Tensor]]:
    """Permutes what surrounds the chosen layers, so that these may stand in branch order.

    Returns:
        By layer name, the orders that the layer must keep itself because its surroundings could not follow.
    """
    moved = {name: layer for name, layer in chosen.items() if not _is_sorted(layer)}
    leftovers: dict[str, dict[str, Tensor]] = {name: {} for name in moved}
    if not moved:
        return leftovers
    graph = ChannelGraph(network)
    modules: dict[str, Any] = dict(network.named_modules())
    for name, layer in moved.items():
        order = _channels(layer, modules[name].out_channels)
        if not _permute_readers(modules, graph.destinations.get(name), order):
            leftovers[name]["output_order"] = order.argsort()
        if modules[name].groups == 1:
            continue
        # The groups of a grouped convolution take their input channels along.
        order = _channels(layer, modules[name].in_channels)
        source = graph.producers.get(name)
        if (
            source is not None
            and source not in chosen
            and modules[source].groups == 1
            and _permute_readers(modules, graph.destinations[source], order, besides=name)
        ):
            _permute(modules[source], 0, order)
        else:
            leftovers[name]["input_order"] = order
    return {name: orders for name, orders in leftovers.items() if orders}


def _permute_readers(
    modules: Mapping[str, Any], to: Destinations | None, order: Tensor, besides: str = ""
) -> bool:
    """Permutes all that reads some channels, or nothing if not all of it can follow; tells which it was."""
    consumers = () if to is None else to.consumers - {besides}
    if to is None or any(modules[name].groups > 1 for name in consumers):
        return False
    for name in to.channelwise:
        _permute(modules[name], 0, order)
    for name in consumers:
        _permute(modules[name], 1, order)
    return True


@torch.no_grad()
def _permute(module: nn.Module, dim: int, order: Tensor) -> None:
    """Puts the channels of a module's tensors in a new order, along the output (0) or the input (1)."""
    for tensor in own_tensors(module):
        if tensor.dim() > dim and tensor.shape[dim] == len(order):
            tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _is_sorted(layer: LayerPattern) -> bool:
    return layer.order() == tuple(range(layer.units))


def _channels(layer: LayerPattern, channels: int) -> Tensor:
    """The layer's order of units as an order of channels: entry j is the original channel at position j."""
    size = channels // layer.units
    return (torch.tensor(layer.order())[:, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def _convert(
    conv: nn.Conv2d, layer: LayerPattern, base_kernel: int, orders: Mapping[str, Tensor]
) -> ICConv2d:
    """The inception convolution with the weights of a plain or supernet convolution."""
    new = ICConv2d(
        conv.in_channels,
        conv.out_channels,
        base_kernel,
        conv.stride,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
        pattern=layer,
    )
    rows = None if _is_sorted(layer) else _channels(layer, conv.out_channels).to(conv.weight.device)
    for name, old in conv.named_parameters(recurse=False):
        value: Tensor = old if rows is None else old.index_select(0, rows)
        if name == "weight" and conv.kernel_size != new.kernel_size:
            value = _crop(value, layer, base_kernel)
        if value is not old:
            last = conv.weight.is_contiguous(memory_format=torch.channels_last) and value.dim() == 4
            value = value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(new, name, value)
    new.write_branches()
    for name, order in orders.items():
        setattr(new, name, order.to(conv.weight.device))
    return new.train(conv.training)


@torch.no_grad()
def _dilate(layer: Involution2d, pattern: LayerPattern, base_kernel: int) -> Involution2d:
    """The involution with a dilation per group; of a grown window those taps stay that the dilations read."""
    if layer.kernel_size == (base_kernel, base_kernel):
        layer.set_pattern(pattern)
        return layer
    old = cast(nn.Conv2d, layer.conv2[0])
    new = Involution2d(
        layer.channels,
        base_kernel,
        layer.stride,
        layer.group_channels,
        layer.reduction,
        layer.kernel_generation,
        pattern=pattern,
        backend=layer.backend,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    new.conv1 = layer.conv1
    kernel, center = layer.kernel_size[0], layer.kernel_size[0] // 2
    steps = torch.arange(base_kernel) - base_kernel // 2
    rows = [
        group * kernel**2 + (center + dy * steps[:, None]) * kernel + center + dx * steps
        for group, (dy, dx) in enumerate(new.dilations)
    ]
    kept = torch.cat([row.flatten() for row in rows]).to(old.weight.device)
    for name, value in old.named_parameters():
        setattr(new.conv2[0], name, nn.Parameter(value[kept], requires_grad=value.requires_grad))
    return new.train(layer.training)


def _crop(weight: Tensor, layer: LayerPattern, base_kernel: int) -> Tensor:
    """The taps that each branch keeps of a supernet's weight, whose rows stand in branch order."""
    size = weight.shape[0] // layer.units
    parts = []
    for part, ((dy, dx), _) in zip(
        weight.split([count * size for _, count in layer.branches]), layer.branches, strict=True
    ):
        top, left = ((weight.shape[2] - 1 - d * (base_kernel - 1)) // 2 for d in (dy, dx))
        bottom, right = weight.shape[2] - top, weight.shape[3] - left
        parts.append(part[:, :, top:bottom:dy, left:right:dx])
    return torch.cat(parts)
