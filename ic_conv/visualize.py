# SPDX-License-Identifier: Apache-2.0
"""Pictures of what layers do on an image."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ic_conv._files import atomic_path
from ic_conv._modes import evaluating
from ic_conv._pattern_summary import stage_of
from ic_conv.layers.involution2d import Involution2d

Pixels = NDArray[np.uint8]

# Mean and standard deviation of ImageNet's RGB values, in units of 1/255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def read_image(path: str | os.PathLike[str], short_side: int) -> Pixels:
    """An image file as RGB, (H, W, 3), scaled so that its short side has `short_side` pixels.

    Raises:
        ValueError: the size is not positive.
        OSError: the file is missing or no image.
    """
    from PIL import Image

    if short_side < 1:
        raise ValueError(f"the image size must be at least 1, got {short_side}")
    with Image.open(path) as image:
        scale = short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def last_of_each_stage(model: nn.Module) -> list[str]:
    """Names of the last involution in each of the model's stages: ``layer1.2.conv2``, ..."""
    return list({stage_of(name): name for name in _involutions(model) if stage_of(name) != "stem"}.values())


def kernel_maps(model: nn.Module, image: Pixels, layers: Sequence[str]) -> dict[str, Tensor]:
    """The sum of the Kh * Kw values of each kernel that the chosen involutions generate.

    Args:
        model: runs in evaluation mode on its own device; its mode is put back.
        image: RGB, (H, W, 3).
        layers: names of `Involution2d` modules.

    Returns:
        By layer, a tensor (G, Ho, Wo).

    Raises:
        ValueError: a name is not that of an involution of the model.
    """
    modules = _involutions(model)
    for name in layers:
        if name not in modules:
            raise ValueError(f"the model has the involutions {', '.join(modules) or '(none)'}; got {name!r}")
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            maps[name] = modules[name].generate_kernel(inputs[0])[0].sum((1, 2)).float().cpu()

        return hook

    x = torch.from_numpy((image - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1)[None]
    parameter = next(model.parameters())
    hooks = [modules[name].register_forward_pre_hook(keep(name)) for name in layers]
    try:
        with evaluating(model):
            model(x.to(parameter))
    finally:
        for handle in hooks:
            handle.remove()
    return {name: maps[name] for name in layers}


def draw_kernel_maps(
    image: Pixels, maps: Mapping[str, Tensor], path: str | os.PathLike[str], title: str, groups: int = 6
) -> None:
    """Draws the image beside the heat maps of each layer's groups (Involution, CVPR 2021, figure 3).

    Each map is scaled to its own range, less the outermost 1 %: bright is where the kernel's values sum high.

    Args:
        image: RGB, (H, W, 3).
        maps: by layer, (G, Ho, Wo).
        path: the file to write, in one atomic step; its suffix says the format.
        title: stands above the picture.
        groups: the most maps in a row; of more groups, those that vary most over the image are drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if groups < 1:
        raise ValueError(f"at least 1 group must be drawn, got {groups}")
    columns = 1 + min(groups, max(len(layer) for layer in maps.values()))
    height, width = image.shape[:2]
    side = 1.9
    figure = Figure(
        figsize=(columns * side * width / height, len(maps) * (side + 0.28) + 0.45), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontweight="bold")
    axes = figure.subplots(len(maps), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (name, layer) in zip(axes, maps.items(), strict=True):
        row[0].imshow(image)
        row[0].set_title(f"{name}, {layer.shape[1]}x{layer.shape[2]}", fontsize=8, loc="left")
        chosen = layer.flatten(1).std(1).argsort(descending=True)[: columns - 1].sort().values
        for ax, group in zip(row[1:], chosen.tolist(), strict=False):
            heat = layer[group].numpy()
            low, high = np.percentile(heat, (1, 99))
            extent = (0, width, height, 0)  # in pixels of the image
            ax.imshow(heat, cmap="magma", vmin=low, vmax=high, extent=extent, interpolation="bicubic")
            ax.set_title(f"group {group + 1} of {len(layer)}", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _involutions(model: nn.Module) -> dict[str, Involution2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Involution2d)}
