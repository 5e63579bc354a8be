# SPDX-License-Identifier: Apache-2.0
"""Warm starts: the network with a found pattern takes the trained supernet's knowledge along.

Copying the taps that a channel keeps loses what the others did. A least-squares fit lets the kept taps stand
in for them as far as the inputs are correlated; see `search.autocorrelation`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ic_conv._modes import evaluating
from ic_conv.convert import apply_pattern, units_of
from ic_conv.pattern import DilationPattern, LayerPattern
from search.autocorrelation import RIDGE, SecondMoments
from search.sharing import owners, send
from search.statistics import ConvMoments, collect, images_of
from search.supernet import space_of, super_layers

Init = Literal["scratch", "crop", "refit"]
INITS: tuple[Init, ...] = get_args(Init)


def warm_start(
    supernet: nn.Module,
    pattern: DilationPattern,
    batches: Callable[[], Iterable[Any]],
    *,
    init: Init = "refit",
    ridge: float = RIDGE,
    inplace: bool = False,
) -> nn.Module:
    """The network with the pattern and with weights from a trained supernet, ready to be used or trained on.

    Args:
        supernet: made by `convert_to_supernet`, then trained. It stays untouched unless `inplace`.
        pattern: of any strategy.
        batches: gives the calibration batches, see `search.statistics.collect`; called for each pass.
        init: ``"crop"`` copies the taps that a channel keeps. ``"refit"`` fits them, and the bias if there is
            one, to the supernet's output; involutions, whose kernels are no constants, are cropped. Either
            way the batch norms' statistics are estimated anew.
        ridge: of the fit, see `SecondMoments.fit`.
        inplace: change `supernet` itself.

    Returns:
        The network, with `ICConv2d` layers.

    Raises:
        ValueError: the pattern does not fit the supernet, there is no calibration data, or init is unknown.

    Example:
        >>> network = warm_start(supernet, pattern, lambda: calibration_loader)      # doctest: +SKIP
        >>> torch.save(network.state_dict(), "ic_resnet50_k9.pt")                    # doctest: +SKIP
    """
    if init not in ("crop", "refit"):
        raise ValueError(f"a warm start must be one of crop, refit; got {init!r}")
    bound = _bound(supernet, pattern)
    network = supernet if inplace else copy.deepcopy(supernet)
    if init == "refit":
        _fit_weights(network, bound, batches(), ridge)
    network = crop(network, bound)
    estimate_batch_norms(network, batches())
    return network


def crop(supernet: nn.Module, pattern: DilationPattern) -> nn.Module:
    """Turns a supernet into the network with the pattern: each channel keeps the taps of its dilation.

    Raises:
        ValueError: the pattern does not fit the supernet.
    """
    grown = super_layers(supernet)
    bound = _bound(supernet, pattern)
    return apply_pattern(supernet, bound, filter_fn=lambda module, name: name in grown, inplace=True)


def _bound(supernet: nn.Module, pattern: DilationPattern) -> DilationPattern:
    return pattern.bind([(name, units_of(layer)) for name, layer in super_layers(supernet).items()])


def estimate_batch_norms(network: nn.Module, batches: Iterable[Any]) -> None:
    """Sets the batch norms' running statistics to the means over the batches' own.

    Raises:
        ValueError: there is no batch.
    """
    norms = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return
    device = next(network.parameters()).device
    momenta = [norm.momentum for norm in norms]
    count = 0
    with evaluating(network):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        try:
            for batch in batches:
                network(images_of(batch).to(device, non_blocking=True))
                count += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not count:
        raise ValueError("the calibration data is empty: batch norms need at least one batch")


@torch.no_grad()
def _fit_weights(supernet: nn.Module, pattern: DilationPattern, batches: Iterable[Any], ridge: float) -> None:
    """Puts fitted values on the taps of each grown kernel that the pattern keeps."""
    space, layers = space_of(supernet), super_layers(supernet)
    moments = collect(supernet, batches, space, correlations=True, shared=True)
    for layer_pattern in pattern.layers:
        name = str(layer_pattern.name)
        moment = moments.pop(name)  # let go of once used
        if isinstance(moment, ConvMoments) and moment.second is not None:
            fit_layer(layers[name], layer_pattern, moment.second, ridge)
    for name, owner in owners(layers).items():
        send(layers[name].parameters(), owner)


def fit_layer(layer: nn.Module, pattern: LayerPattern, second: SecondMoments, ridge: float) -> None:
    """Puts fitted values on the taps of a grown kernel that the pattern keeps, in place.

    Args:
        layer: a grown convolution.
        pattern: of this layer.
        second: what it saw, of `search.statistics.collect` with correlations.
        ridge: see `SecondMoments.fit`.
    """
    assert isinstance(layer, nn.Conv2d)
    size = layer.out_channels // pattern.units
    kernels = layer.weight.flatten(2)
    for dilation, _ in pattern.branches:
        units = torch.tensor([unit for unit, its in enumerate(pattern.dilations) if its == dilation])
        channels = (units[:, None] * size + torch.arange(size)).flatten().to(kernels.device)
        fit = second.fit(dilation, units.to(kernels.device), ridge)
        taps = second.space.taps[second.space.candidates.index(dilation)].to(kernels.device)
        rows = kernels[channels]
        rows[:, :, taps] = fit.taps.to(kernels)
        kernels[channels] = rows
        if layer.bias is not None:
            layer.bias[channels] = fit.offset.to(layer.bias)
