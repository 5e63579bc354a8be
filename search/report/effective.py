# SPDX-License-Identifier: Apache-2.0
"""The effective receptive field: where in the image the gradient of a layer's centre output lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ic_conv._modes import evaluating
from ic_conv._pattern_summary import stage_of
from ic_conv.convert import apply_pattern
from ic_conv.pattern import DilationPattern, LayerPattern
from search.statistics import images_of

SHARE = 0.9  # of the gradient, which an extent holds
_CELLS = 48  # a stored map has at most so many cells per side


Field = dict[str, Any]


def effective_fields(
    supernet: nn.Module, pattern: DilationPattern, images: Tensor
) -> dict[str, dict[str, Field]]:
    """Fields of the last searched layer of each stage: {layer: {"plain": field, "found": field}}.

    A field has ``extent``, height and width in pixels of the middle 90 % of the gradient, and ``map``, the
    gradient on at most 48 x 48 cells, 1000 where it is largest.

    Both networks are cropped from the same supernet, one with dilation (1, 1) everywhere and one with the
    pattern, and their batch norms take statistics anew from the images, whose scale cropping changes.
    After Luo et al., *Understanding the Effective Receptive Field in Deep CNNs*, NeurIPS 2016.

    Args:
        supernet: made by `convert_to_supernet`; it stays untouched.
        pattern: found on it.
        images: (N, 3, H, W), on the supernet's device.

    Raises:
        ValueError: the pattern does not fit the supernet.
    """
    plain = tuple(LayerPattern.plain(layer.units, layer.name) for layer in pattern.layers)
    patterns = {"plain": DilationPattern(plain, pattern.kernel, pattern.base_kernel), "found": pattern}
    layers = last_layers([str(name) for name in pattern.names])
    fields: dict[str, dict[str, Field]] = {name: {} for name in layers}
    for kind, chosen in patterns.items():
        network = apply_pattern(supernet, chosen)
        update_bn([images], network)
        for name, gradient in centre_gradients(network, layers, images).items():
            fields[name][kind] = {"extent": extent(gradient), "map": _coarse(gradient)}
    return fields


def last_layers(names: Sequence[str]) -> list[str]:
    """The last layer of each stage."""
    return [list(members)[-1] for _, members in groupby(names, key=stage_of)]


def centre_gradients(
    network: nn.Module, layers: Sequence[str], images: Tensor
) -> dict[str, NDArray[np.float64]]:
    """Sum over images and colours of |d output / d image|, for the centre output of each layer: (H, W).

    The output is that position's sum over channels; a map of even size has two middle rows, of which the
    lower counts.
    """
    outputs: dict[str, Tensor] = {}
    modules = dict(network.named_modules())
    images = images.detach().clone().requires_grad_()
    with ExitStack() as hooks, evaluating(network), torch.enable_grad():
        for name in layers:

            def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = output

            hooks.callback(modules[name].register_forward_hook(keep).remove)
        network(images)
        gradients = {}
        for name, output in outputs.items():
            centre = output[:, :, output.shape[2] // 2, output.shape[3] // 2].sum()
            (gradient,) = torch.autograd.grad(centre, images, retain_graph=True)
            gradients[name] = gradient.abs().sum((0, 1)).double().cpu().numpy()
    return gradients


def extent(gradient: NDArray[np.float64]) -> list[float]:
    """Height and width of the middle 90 % of the gradient, wherever it lies; 0 where there is none."""
    return [_middle(gradient.sum(axis)) for axis in (1, 0)]


def _middle(marginal: NDArray[np.float64]) -> float:
    total = marginal.sum()
    if not total > 0:
        return 0.0
    below = np.concatenate([[0.0], np.cumsum(marginal) / total])
    low, high = np.interp([(1 - SHARE) / 2, (1 + SHARE) / 2], below, np.arange(len(below)))
    return round(float(high - low), 2)


def _coarse(gradient: NDArray[np.float64]) -> list[list[int]]:
    """Averaged over cells, so that a record stays small."""
    step = -(-max(gradient.shape) // _CELLS)
    rows, columns = (-(-side // step) for side in gradient.shape)
    padded = np.pad(gradient, ((0, rows * step - gradient.shape[0]), (0, columns * step - gradient.shape[1])))
    cells = padded.reshape(rows, step, columns, step).mean((1, 3))
    return np.rint(1000 * cells / max(cells.max(), np.finfo(float).tiny)).astype(int).tolist()


def take_images(batches: Iterable[Any], count: int) -> Tensor:
    """The first images of the calibration data that have the size of the very first.

    Raises:
        ValueError: there is none.
    """
    taken: list[Tensor] = []
    for batch in batches:
        images = images_of(batch)
        if not taken or images.shape[1:] == taken[0].shape[1:]:
            taken.append(images)
        if sum(map(len, taken)) >= count:
            break
    if not taken:
        raise ValueError("the calibration data is empty: at least one batch is needed")
    return torch.cat(taken)[:count]
