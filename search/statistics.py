# SPDX-License-Identifier: Apache-2.0
"""One streaming pass over calibration data: the moments that the criteria need, at constant memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ic_conv._modes import evaluating
from search._moments import ConvMoments, ConvSums, InvolutionSums, LayerMoments, LayerSums
from search.sharing import own
from search.space import DilationSpace
from search.supernet import SuperConv2d, super_layers

__all__ = ["ConvMoments", "LayerMoments", "collect", "images_of"]

logger = logging.getLogger(__name__)
MERGED_IMAGES, MERGED_PIXELS = 32, 2**21  # most in a batch that is put together for second moments
CONSTANT = 1e-6  # variance over mean square: below it rounding may have made all of it


def collect(
    supernet: nn.Module,
    batches: Iterable[Any],
    space: DilationSpace,
    *,
    residuals: bool = False,
    correlations: bool = False,
    shared: bool = False,
) -> dict[str, LayerMoments]:
    """Runs the batches through the supernet in eval mode and returns the moments of each grown layer.

    Args:
        supernet: a network made by `convert_to_supernet`.
        batches: image batches (N, 3, H, W), or tuples, lists or dicts that hold one first or under
            ``"inputs"``. Sizes may vary from batch to batch.
        space: the search space of the supernet.
        residuals: collect `residual` and `variance` too, which the criterion ``mse`` needs, on the first
            batch and every eighth after it.
        correlations: collect `second` of the convolutions too, which the criterion ``refit`` and the refit
            of weights need. Means are removed where a bias or a later batch norm makes up for them, that is
            if the layer has a bias or the network has batch norms. Batches are put together to about 32
            images, since each costs the same.
        shared: collect `second` only of the layers that are this process's, see `search.sharing`.

    Raises:
        ValueError: no batch, no grown layer, or one that the network never ran.
    """
    layers = super_layers(supernet)
    if not layers:
        raise ValueError("the network has no grown layer: make a supernet with convert_to_supernet first")
    device = next(supernet.parameters()).device
    normed = any(isinstance(module, _BatchNorm) for module in supernet.modules())
    second = () if not correlations else own(layers) if shared else layers
    sums: dict[str, LayerSums] = {
        name: ConvSums(name, layer, space, residuals, name in second, normed or layer.bias is not None)
        if isinstance(layer, SuperConv2d)
        else InvolutionSums(name, layer, space, residuals)
        for name, layer in layers.items()
    }
    size = None
    with ExitStack() as hooks, evaluating(supernet):
        for layer_sums in sums.values():
            for handle in layer_sums.attach():
                hooks.callback(handle.remove)
        for images in _merged(batches) if correlations else map(images_of, batches):
            images = images.to(device, non_blocking=True)
            size = images.shape[-2], images.shape[-1]
            supernet(images)
    if size is None:
        raise ValueError("the calibration data is empty: at least one batch is needed")
    moments = {name: layer_sums.moments(size) for name, layer_sums in sums.items()}
    if correlations:
        _warn_of_few(moments)
        _warn_of_constant(moments)
    return moments


def _merged(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The images of the batches, those of one size in larger batches."""
    waiting: list[Tensor] = []
    for images in map(images_of, batches):
        together = [*waiting, images]
        count = sum(map(len, together))
        pixels = count * images.shape[2] * images.shape[3]
        if waiting and (
            images.shape[1:] != waiting[0].shape[1:] or count > MERGED_IMAGES or pixels > MERGED_PIXELS
        ):
            yield torch.cat(waiting)
            together = [images]
        waiting = together
    if waiting:
        yield torch.cat(waiting)


def _warn_of_few(moments: Mapping[str, LayerMoments]) -> None:
    """Names the layer whose fit has the least data, if it has fewer equations than unknowns."""
    seconds = {
        name: moment.second
        for name, moment in moments.items()
        if isinstance(moment, ConvMoments) and moment.second is not None
    }
    if not seconds:
        return
    name, worst = min(seconds.items(), key=lambda item: item[1].positions / item[1].unknowns)
    if worst.positions < worst.unknowns:
        logger.warning(
            "%s: %d output positions are few for %d weights per channel; those that the data leave open stay "
            "near the copied ones (give %.1f times as many calibration images)",
            *(name, worst.positions, worst.unknowns, worst.unknowns / worst.positions),
        )


def _warn_of_constant(moments: Mapping[str, LayerMoments]) -> None:
    """Says how many input channels tell a fit nothing, and where most of them are."""
    constant: dict[str, tuple[int, int]] = {}
    for name, moment in moments.items():
        if isinstance(moment, ConvMoments):
            mean, square = (x[:, x.shape[1] // 2, x.shape[2] // 2] for x in (moment.mean, moment.square))
            still = square - mean.square() <= CONSTANT * square
            constant[name] = int(still.sum()), len(still)
    if (count := sum(still for still, _ in constant.values())) > 0:
        worst = max(constant, key=lambda name: constant[name][0] / constant[name][1])
        logger.warning(
            "%d of %d input channels are dead or constant over the calibration images (in %s %d of %d): "
            "a fit learns nothing from them",
            *(count, sum(channels for _, channels in constant.values()), worst, *constant[worst]),
        )


def images_of(batch: Any) -> Tensor:
    """The image tensor of a batch as data loaders yield it."""
    if isinstance(batch, Mapping):
        batch = batch["inputs"]
    elif isinstance(batch, list | tuple):
        batch = batch[0]
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        raise TypeError(f"a calibration batch must hold images (N, C, H, W), got {type(batch).__name__}")
    return batch
