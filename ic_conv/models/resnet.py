# SPDX-License-Identifier: Apache-2.0
"""ResNets with dilation patterns (IC-ResNet), and the plain ones that they become without."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ic_conv import checkpoint
from ic_conv.convert import apply_pattern
from ic_conv.pattern import DilationPattern

logger = logging.getLogger(__name__)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first has the stride.

    Args:
        in_channels, planes: channels of the input and of the output.
        stride: of the block.
        groups, width_per_group: as in `ResNet`; here only 1 and 64.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, planes: int, stride: int = 1, groups: int = 1, width_per_group: int = 64
    ) -> None:
        super().__init__()
        if groups != 1 or width_per_group != 64:
            raise ValueError(
                f"a BasicBlock has groups 1 and width_per_group 64; got {groups} and {width_per_group}"
            )
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution; the 3x3 has the stride (ResNet v1.5).

    Args:
        in_channels: channels of the input; the output has 4 * planes.
        stride: of the block.
        groups, width_per_group: of the 3x3 convolution, as in `ResNet`.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, planes: int, stride: int = 1, groups: int = 1, width_per_group: int = 64
    ) -> None:
        super().__init__()
        width = planes * width_per_group // 64 * groups
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + identity)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """A plain ResNet with torchvision's module names, initialisation and results.

    N batch, H x W image size, F features of the last stage.

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks in each of the four stages; fewer numbers, fewer stages.
        num_classes: outputs of the classifier.
        groups, width_per_group: of a Bottleneck's 3x3 convolutions; 32 and 4 make a ResNeXt 32x4d.
        width: channels of the stem and of the first stage's planes; 64 in the published networks.
        stem_pool: whether the stem ends with max pooling; without, strides are halved, for small images.
        out_indices: stages (0 to 3) whose features forward returns, instead of the classifier's output.

    Attributes:
        out_channels: channels of each stage.

    Shape:
        input (N, 3, H, W), output (N, num_classes); or a tuple of feature maps (N, out_channels[i],
        H / (4 * 2^i), W / (4 * 2^i)), rounded up, for i in out_indices.

    Example:
        >>> slim = ResNet(Bottleneck, (3, 4, 6, 3), width=16, out_indices=(2, 3))
        >>> [tuple(f.shape) for f in slim(torch.rand(1, 3, 64, 64))]
        [(1, 256, 4, 4), (1, 512, 2, 2)]
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        groups: int = 1,
        width_per_group: int = 64,
        width: int = 64,
        stem_pool: bool = True,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        stages = range(len(layers))
        if out_indices is not None and (not out_indices or not set(out_indices) <= set(stages)):
            raise ValueError(f"out_indices must be stages from 0 to {stages[-1]}; got {tuple(out_indices)}")
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem_pool else nn.Identity()
        self.out_indices = None if out_indices is None else tuple(out_indices)
        self.out_channels = tuple(width * 2**stage * block.expansion for stage in stages)
        channels = width
        for stage, (count, out_channels) in enumerate(zip(layers, self.out_channels, strict=True)):
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                planes = out_channels // block.expansion
                blocks.append(block(channels, planes, stride, groups, width_per_group))
                channels = out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        if self.out_indices is None:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features = []
        for stage in range(len(self.out_channels)):
            x = getattr(self, f"layer{stage + 1}")(x)
            features.append(x)
        if self.out_indices is not None:
            return tuple(features[index] for index in self.out_indices)
        return self.fc(self.avgpool(x).flatten(1))


class _Architecture(NamedTuple):
    block: type[BasicBlock] | type[Bottleneck]
    layers: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64


ARCHITECTURES = {
    "ic_resnet18": _Architecture(BasicBlock, (2, 2, 2, 2)),
    "ic_resnet34": _Architecture(BasicBlock, (3, 4, 6, 3)),
    "ic_resnet50": _Architecture(Bottleneck, (3, 4, 6, 3)),
    "ic_resnet101": _Architecture(Bottleneck, (3, 4, 23, 3)),
    "ic_resnet152": _Architecture(Bottleneck, (3, 8, 36, 3)),
    "ic_resnext101_32x4d": _Architecture(Bottleneck, (3, 4, 23, 3), 32, 4),
}


def ic_resnet(
    name: str,
    pattern_path: str | os.PathLike[str] | None = None,
    *,
    pattern: DilationPattern | None = None,
    num_classes: int | None = None,
    out_indices: Sequence[int] | None = None,
    weights: checkpoint.Weights | None = None,
    **options: Any,
) -> ResNet:
    """Builds a ResNet of the table `ARCHITECTURES` and gives its 3x3 convolutions a dilation pattern.

    Args:
        name: ``ic_resnet50`` for example.
        pattern_path: a pattern file. Without a pattern the network is a plain ResNet.
        pattern: the pattern itself, instead of a file.
        num_classes: outputs of the classifier; by default as many as the weights have, else 1000.
        out_indices: stages (0 to 3) whose features are returned as a tuple, instead of a classification.
        weights: a file or state dict with torchvision's keys (plain weights, which are put in the pattern's
            order), of this network, or of a published IC-ResNet. Prefixes such as ``backbone.`` are
            dropped. Weights of this network bring their pattern along, if none is given.
        options: `width` and `stem_pool` of `ResNet`.

    Raises:
        ValueError: an unknown name, a pattern or weights that do not fit.
        OSError: a file is missing or cannot be read.

    Example:
        >>> net = ic_resnet50("pattern_zoo/detection/ic_resnet50_k9.json", out_indices=(1, 2, 3))
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"the ResNets are {', '.join(ARCHITECTURES)}; got {name!r}")
    if pattern_path is not None and pattern is not None:
        raise ValueError(f"pattern and pattern_path exclude each other; got both, the path {pattern_path}")
    if pattern_path is not None:
        pattern = DilationPattern.load(pattern_path)
    state, source = ({}, "") if weights is None else checkpoint.read_weights(weights)
    state = checkpoint.without_prefix(state, "layer1.0.conv1.weight")
    if num_classes is None:
        num_classes = len(state["fc.weight"]) if "fc.weight" in state else 1000
    block, layers, groups, width_per_group = ARCHITECTURES[name]
    options |= {"groups": groups, "width_per_group": width_per_group, "out_indices": out_indices}
    net = ResNet(block, layers, num_classes, **options)
    if weights is None:
        return net if pattern is None else _with_pattern(net, pattern)

    _fit_classifier(state, net, source)
    layout = checkpoint.layout(state)
    if layout == "plain":
        checkpoint.load_weights(net, state, source)
    if layout == "published" and pattern is None:
        raise ValueError(f"{source}: the published layout does not tell the dilations; give the pattern")
    if layout == "branches" and pattern is None:
        pattern = checkpoint.pattern_of(state)
    if pattern is not None:
        net = _with_pattern(net, pattern)
    if layout != "plain":
        checkpoint.load_weights(net, state, source)
    return net


def _with_pattern(net: ResNet, pattern: DilationPattern) -> ResNet:
    return cast(ResNet, apply_pattern(net, pattern, inplace=True))


def _fit_classifier(state: dict[str, Tensor], net: nn.Module, source: str) -> None:
    """Takes weights of a classifier that the network does not have out of the state dict."""
    own = {key: value for key, value in net.state_dict().items() if key.startswith("fc.")}
    if not own:
        for key in ("fc.weight", "fc.bias"):
            state.pop(key, None)
    elif "fc.weight" in state and state["fc.weight"].shape != own["fc.weight"].shape:
        logger.warning(
            "%s: a classifier of %d classes is not used, the new one has %d",
            *(source, len(state["fc.weight"]), len(own["fc.weight"])),
        )
        state.update(own)
    elif not own.keys() & state.keys():  # a feature network's, as the search command writes it
        logger.warning("%s: holds no classifier, the new one is untrained", source)
        state.update(own)


def ic_resnet18(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> ResNet:
    """IC-ResNet-18; arguments as in `ic_resnet`."""
    return ic_resnet("ic_resnet18", pattern_path, **options)


def ic_resnet34(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> ResNet:
    """IC-ResNet-34; arguments as in `ic_resnet`."""
    return ic_resnet("ic_resnet34", pattern_path, **options)


def ic_resnet50(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> ResNet:
    """IC-ResNet-50; arguments as in `ic_resnet`."""
    return ic_resnet("ic_resnet50", pattern_path, **options)


def ic_resnet101(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> ResNet:
    """IC-ResNet-101; arguments as in `ic_resnet`."""
    return ic_resnet("ic_resnet101", pattern_path, **options)


def ic_resnet152(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> ResNet:
    """IC-ResNet-152; arguments as in `ic_resnet`."""
    return ic_resnet("ic_resnet152", pattern_path, **options)


def ic_resnext101_32x4d(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> ResNet:
    """IC-ResNeXt-101 32x4d, whose pattern counts groups; arguments as in `ic_resnet`."""
    return ic_resnet("ic_resnext101_32x4d", pattern_path, **options)
