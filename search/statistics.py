# SPDX-License-Identifier: Apache-2.0
"""One streaming pass over calibration data: the moments that the criteria need, at constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ic_conv._modes import evaluating
from search._moments import ConvSums, InvolutionSums, LayerMoments, LayerSums
from search.space import DilationSpace
from search.supernet import SuperConv2d, super_layers

__all__ = ["LayerMoments", "collect", "images_of"]


def collect(
    supernet: nn.Module, batches: Iterable[Any], space: DilationSpace, *, residuals: bool = False
) -> dict[str, LayerMoments]:
    """Runs the batches through the supernet in eval mode and returns the moments of each grown layer.

    Args:
        supernet: a network made by `convert_to_supernet`.
        batches: image batches (N, 3, H, W), or tuples, lists or dicts that hold one first or under
            ``"inputs"``. Sizes may vary from batch to batch.
        space: the search space of the supernet.
        residuals: collect `residual` and `variance` too, which the criterion ``mse`` needs, on the first
            batch and every eighth after it.

    Raises:
        ValueError: no batch, no grown layer, or one that the network never ran.
    """
    layers = super_layers(supernet)
    if not layers:
        raise ValueError("the network has no grown layer: make a supernet with convert_to_supernet first")
    device = next(supernet.parameters()).device
    sums: dict[str, LayerSums] = {
        name: ConvSums(name, layer, space, residuals)
        if isinstance(layer, SuperConv2d)
        else InvolutionSums(name, layer, space, residuals)
        for name, layer in layers.items()
    }
    size = None
    with ExitStack() as hooks, evaluating(supernet):
        for layer_sums in sums.values():
            for handle in layer_sums.attach():
                hooks.callback(handle.remove)
        for batch in batches:
            images = images_of(batch).to(device, non_blocking=True)
            size = images.shape[-2], images.shape[-1]
            supernet(images)
    if size is None:
        raise ValueError("the calibration data is empty: at least one batch is needed")
    return {name: layer_sums.moments(size) for name, layer_sums in sums.items()}


def images_of(batch: Any) -> Tensor:
    """The image tensor of a batch as data loaders yield it."""
    if isinstance(batch, Mapping):
        batch = batch["inputs"]
    elif isinstance(batch, list | tuple):
        batch = batch[0]
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        raise TypeError(f"a calibration batch must hold images (N, C, H, W), got {type(batch).__name__}")
    return batch
