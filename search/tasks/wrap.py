# SPDX-License-Identifier: Apache-2.0
"""Finds the task that fits a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from search.tasks.base import Task
from search.tasks.classification import Classification
from search.tasks.heatmap import CenterHeatmap


def wrap(network: nn.Module, num_classes: int, image_size: int = 64) -> Task:
    """The task that fits what `network` returns, found by one forward pass of one black image.

    A feature map or a sequence of them is trained for centre heat maps, logits for classification.

    Args:
        network: any module that takes (N, 3, image_size, image_size); it is used, not copied.
        num_classes: number of classes of the data.
        image_size: side of the images in px.

    Raises:
        ValueError: the network returns neither, fails on such an image, or has too few logits.

    Example:
        >>> type(wrap(nn.Conv2d(3, 8, 3), num_classes=10)).__name__
        'CenterHeatmap'
    """
    name = type(network).__name__
    output = _dry_forward(network, image_size)
    if isinstance(output, Tensor) and output.ndim == 2:
        if output.shape[1] < num_classes:
            raise ValueError(
                f"{name} must return a logit per class: {num_classes} classes, {output.shape[1]} logits"
            )
        return Classification(network, num_classes)
    levels = (output,) if isinstance(output, Tensor) else output
    if isinstance(levels, (tuple, list)) and levels and all(_is_map(level) for level in levels):
        return CenterHeatmap(network, num_classes, [level.shape[1] for level in levels], image_size)
    raise ValueError(
        f"{name} must return logits (N, C), a feature map (N, C, H, W) or a sequence of them; "
        f"got {_describe(output)}"
    )


def _dry_forward(network: nn.Module, image_size: int) -> Any:
    first = next(network.parameters(), torch.zeros(()))
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            return network(torch.zeros(1, 3, image_size, image_size, device=first.device, dtype=first.dtype))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{type(network).__name__} must take images (1, 3, {image_size}, {image_size}): {reason}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, (tuple, list)):
        return f"[{', '.join(_describe(part) for part in output)}]"
    return type(output).__name__
