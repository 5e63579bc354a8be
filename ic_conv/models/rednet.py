# SPDX-License-Identifier: Apache-2.0
"""RedNet: residual networks whose 3x3 convolutions are involutions (Li et al., "Involution", CVPR 2021)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ic_conv import checkpoint
from ic_conv.convert import apply_pattern
from ic_conv.layers.involution2d import Involution2d, conv_bn_relu
from ic_conv.models._rednet_keys import from_published
from ic_conv.models.resnet import Bottleneck, _fit_classifier
from ic_conv.pattern import DilationPattern, LayerPattern

Operator = Callable[..., nn.Module]

BLOCKS = {
    "rednet26": (1, 2, 4, 1),
    "rednet38": (2, 3, 5, 2),
    "rednet50": (3, 4, 6, 3),
    "rednet101": (3, 4, 23, 3),
    "rednet152": (3, 8, 36, 3),
}


class RedNetBlock(Bottleneck):
    """A Bottleneck with another operator, `operator(channels, stride=stride)`, for its 3x3 convolution."""

    def __init__(self, in_channels: int, planes: int, stride: int, operator: Operator) -> None:
        super().__init__(in_channels, planes, stride)
        self.conv2 = operator(planes, stride=stride)  # type: ignore[assignment]


class RedNet(nn.Module):
    """A ResNet of involutions, with the module names and initialisation of the published one.

    N batch, H x W image size.

    Args:
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the classifier.
        operator: the layer in place of a 3x3 convolution, Involution2d or CVolution2d.
        kernel_size: window of the involutions.
        stem_kernel_size: window of the stem's involution, by default `kernel_size`. The published detectors
            and segmenters have 7, the published classifiers 3.
        group_channels: channels that share a kernel; None means all channels of a layer.
        width: channels after the stem and of the first stage's involutions; the stem's has half as many.
        stem_pool: whether the stem ends with max pooling; without, strides are halved, for small images.
        out_indices: stages (0 to 3) whose features forward returns, instead of the classifier's output.
        options: further options of every operator: `reduction`, `kernel_generation`, `backend`, ...

    Attributes:
        kernel_size: window of the involutions in the stages.
        out_channels: channels of each of the four stages.

    Shape:
        input (N, 3, H, W), output (N, num_classes); or a tuple of feature maps (N, out_channels[i],
        H / (4 * 2^i), W / (4 * 2^i)), rounded up, for i in out_indices. On a CPU the maps are channels last.

    Example:
        >>> slim = RedNet((1, 2, 4, 1), width=16, group_channels=8, out_indices=(2, 3))
        >>> [tuple(f.shape) for f in slim(torch.rand(1, 3, 64, 64))]
        [(1, 256, 4, 4), (1, 512, 2, 2)]
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        operator: Operator = Involution2d,
        kernel_size: int = 7,
        stem_kernel_size: int | None = None,
        group_channels: int | None = 16,
        width: int = 64,
        stem_pool: bool = True,
        out_indices: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if out_indices is not None and (not out_indices or not set(out_indices) <= {0, 1, 2, 3}):
            raise ValueError(f"out_indices must be stages from 0 to 3; got {tuple(out_indices)}")

        def build(channels: int, stride: int = 1, kernel_size: int = kernel_size) -> nn.Module:
            shared = channels if group_channels is None else group_channels
            return operator(channels, kernel_size, stride, group_channels=shared, **options)

        self.kernel_size = kernel_size
        half = width // 2
        self.stem = nn.Sequential(
            conv_bn_relu(3, half, 3, stride=2),
            build(half, kernel_size=kernel_size if stem_kernel_size is None else stem_kernel_size),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            conv_bn_relu(half, width, 3),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem_pool else nn.Identity()
        self.out_indices = None if out_indices is None else tuple(out_indices)
        self.out_channels = tuple(width * 2**stage * RedNetBlock.expansion for stage in range(4))
        channels = width
        for stage, (count, out_channels) in enumerate(zip(layers, self.out_channels, strict=True)):
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(RedNetBlock(channels, width * 2**stage, stride, build))
                channels = out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        if self.out_indices is None:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(channels, num_classes)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, RedNetBlock):
                nn.init.zeros_(module.bn3.weight)  # every block starts as the identity

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if x.device.type == "cpu":  # 1x1 convolutions would reorder any other layout, in and out
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.stem(x))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        if self.out_indices is not None:
            return tuple(features[index] for index in self.out_indices)
        return self.fc(self.avgpool(x).flatten(1))


def rednet(
    name: str,
    pattern_path: str | os.PathLike[str] | None = None,
    *,
    pattern: DilationPattern | None = None,
    num_classes: int | None = None,
    out_indices: Sequence[int] | None = None,
    weights: checkpoint.Weights | None = None,
    **options: Any,
) -> RedNet:
    """Builds a RedNet of the table `BLOCKS`, whose groups may have a dilation pattern.

    Args:
        name: ``rednet50`` for example.
        pattern_path: a pattern file. Its layers are those with a window of `kernel_size`, in module order:
            the involutions, the stem's first if it has that window too; its counts are groups. With a
            `kernel_size` of 3 the stem's two convolutions are among them, as in a search.
        pattern: the pattern itself, instead of a file.
        num_classes: outputs of the classifier; by default as many as the weights have, else 1000.
        out_indices: stages (0 to 3) whose features are returned as a tuple, instead of a classification.
        weights: a file or state dict of this network, or of a published RedNet: a classifier, or the backbone
            of a detector or segmenter. Weights of this network bring their pattern along, if none is given.
        options: further ones of `RedNet`.

    Raises:
        ValueError: an unknown name, a pattern or weights that do not fit.
        OSError: a file is missing or cannot be read.

    Example:
        >>> net = rednet50(weights="rednet50.pth", stem_kernel_size=3)
    """
    if name not in BLOCKS:
        raise ValueError(f"the RedNets are {', '.join(BLOCKS)}; got {name!r}")
    if pattern_path is not None and pattern is not None:
        raise ValueError(f"pattern and pattern_path exclude each other; got both, the path {pattern_path}")
    if pattern_path is not None:
        pattern = DilationPattern.load(pattern_path)
    state, source = ({}, "") if weights is None else checkpoint.read_weights(weights)
    state = from_published(state)
    if num_classes is None:
        num_classes = len(state["fc.weight"]) if "fc.weight" in state else 1000
    net = RedNet(BLOCKS[name], num_classes, out_indices=out_indices, **options)
    if weights is None:
        return net if pattern is None else _with_pattern(net, pattern)

    _fit_classifier(state, net, source)
    _check_windows(net, state, source)
    plain = not any(key.endswith((".branches", ".group_dilations")) for key in state)
    if plain:
        checkpoint.load_weights(net, state, source)
    if pattern is not None:
        net = _with_pattern(net, pattern)
    if not plain:
        if pattern is None:
            _set_pattern_of(net, state)
        checkpoint.load_weights(net, state, source)
    return net


def _with_pattern(net: RedNet, pattern: DilationPattern) -> RedNet:
    if not any(pattern.names):  # nothing but counts, which do not tell their base kernel
        kernel = pattern.max_dilation * (net.kernel_size - 1) + 1
        pattern = replace(pattern, kernel=kernel, base_kernel=net.kernel_size)
    return cast(RedNet, apply_pattern(net, pattern, inplace=True))


def _set_pattern_of(net: RedNet, state: Mapping[str, Tensor]) -> None:
    """Gives the network the pattern that its own state dict tells."""
    for name, module in _involutions(net).items():
        if (rows := state.get(f"{name}.group_dilations")) is not None:
            module.set_pattern(LayerPattern.from_assignment([(dy, dx) for dy, dx in rows.tolist()], name))
    if (convs := checkpoint.pattern_of(state)) is not None:
        apply_pattern(net, convs, filter_fn=lambda _, name: name in convs.names, inplace=True)


def _involutions(net: nn.Module) -> dict[str, Involution2d]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Involution2d)}


def _check_windows(net: RedNet, state: Mapping[str, Tensor], source: str) -> None:
    for name, module in _involutions(net).items():
        weight = state.get(f"{name}.conv2.conv.weight")
        size = math.isqrt(0 if weight is None else len(weight) // module.groups)
        if size and size != module.kernel_size[0]:
            option = "stem_kernel_size" if name.startswith("stem.") else "kernel_size"
            raise ValueError(
                f"{source}: {name} has a window of {size}x{size}, the network's has "
                f"{module.kernel_size[0]}x{module.kernel_size[1]}: build it with {option}={size}"
            )


def rednet26(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> RedNet:
    """RedNet-26; arguments as in `rednet`."""
    return rednet("rednet26", pattern_path, **options)


def rednet38(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> RedNet:
    """RedNet-38; arguments as in `rednet`."""
    return rednet("rednet38", pattern_path, **options)


def rednet50(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> RedNet:
    """RedNet-50; arguments as in `rednet`."""
    return rednet("rednet50", pattern_path, **options)


def rednet101(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> RedNet:
    """RedNet-101; arguments as in `rednet`."""
    return rednet("rednet101", pattern_path, **options)


def rednet152(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> RedNet:
    """RedNet-152; arguments as in `rednet`."""
    return rednet("rednet152", pattern_path, **options)
