# SPDX-License-Identifier: Apache-2.0
"""apply_pattern: the network must compute what the supernet computes with only the chosen taps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet

from ic_conv.convert import apply_pattern, replace_modules, searchable_layers
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.pattern import DilationPattern, LayerPattern

BASE, KERNEL, REACH = 3, 9, 4


class UNet(nn.Module):
    """Two levels with a concatenation, a resize to another tensor's size and biased convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = self._double(3, width)
        self.bottom = self._double(width, 2 * width)
        self.up = self._double(3 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _double(channels: int, width: int) -> nn.Sequential:
        convs = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding="same")
        norms = nn.BatchNorm2d(width), nn.InstanceNorm2d(width, affine=True)
        return nn.Sequential(convs[0], norms[0], nn.PReLU(width), convs[1], norms[1], nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        x = self.bottom(F.max_pool2d(skip, 2))
        x = F.interpolate(x, size=skip.shape[-2:])
        return self.out(self.up(torch.cat([x, skip], 1)))


class Inverted(nn.Module):
    """Depthwise convolution between pointwise ones, then a branch that only training uses."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1, groups=width), nn.BatchNorm2d(width))
        self.project = nn.Conv2d(width, 4, 1)
        self.middle = nn.Conv2d(4, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 4, 3, padding=1)
        self.auxiliary = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.project(self.depthwise(self.expand(x))))
        if self.training:
            return self.last(x).mean() + self.auxiliary(x.mean((2, 3))).sum()
        return self.last(x)


class Untraceable(nn.Module):
    """Control flow that depends on values, a shared convolution, and grouped ones that nothing can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.shared
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 1e9:
            return x
        return self.grouped(self.again(F.relu(self.shared(x))))


def resnet18() -> nn.Module:
    return resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], num_classes=5)


def resnet50() -> nn.Module:
    return resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=5)


def resnext() -> nn.Module:
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=8, width_per_group=8)


def timm_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, num_classes=5)

    build.__name__ = name
    return build


NETWORKS = [resnet18, resnet50, resnext, UNet, Inverted, Untraceable]
TIMM = [timm_model(name) for name in ("resnet10t", "mobilenetv2_050", "seresnext26ts")]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The network in float64, with norm statistics and affine values that differ from channel to channel."""
    torch.manual_seed(0)
    net = build().double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            if module.track_running_stats:
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def found_pattern(net: nn.Module, kernel: int = KERNEL) -> DilationPattern:
    """A random dilation for each unit of each searchable layer."""
    rng, layers = random.Random(0), []
    for name, conv in searchable_layers(net).items():
        units = conv.out_channels if conv.groups == 1 else conv.groups
        assignment = [(rng.randint(1, REACH), rng.randint(1, REACH)) for _ in range(units)]
        layers.append(LayerPattern.from_assignment(assignment, name))
    return DilationPattern(tuple(layers), kernel)


def masked_supernet(net: nn.Module, pattern: DilationPattern) -> nn.Module:
    """The network with 9x9 kernels that are zero but for the taps of each channel's dilation."""
    new = {}
    for layer in pattern.layers:
        conv = searchable_layers(net)[str(layer.name)]
        grown = nn.Conv2d(
            conv.in_channels, conv.out_channels, KERNEL, conv.stride, KERNEL // 2, 1, conv.groups,
            conv.bias is not None, dtype=conv.weight.dtype,
        )  # fmt: skip
        mask = torch.zeros_like(grown.weight)
        rows = conv.out_channels // layer.units
        for unit, (dy, dx) in enumerate(layer.assignment or ()):
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    mask[unit * rows : (unit + 1) * rows, :, REACH + i * dy, REACH + j * dx] = 1
        grown.weight.data *= mask
        new[str(layer.name)] = grown
    return replace_modules(copy.deepcopy(net), new)


def image(size: int = 33) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", NETWORKS + TIMM, ids=lambda build: build.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_the_masked_supernet(build: Callable[[], nn.Module], training: bool) -> None:
    net = seeded(build)
    pattern = found_pattern(net)
    supernet = masked_supernet(net, pattern).train(training)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    model = apply_pattern(supernet, pattern)
    assert all(torch.equal(before[key], value) for key, value in supernet.state_dict().items())
    assert sum(isinstance(m, ICConv2d) for m in model.modules()) == len(pattern.layers)
    x = image(65)
    torch.testing.assert_close(model(x), supernet(x), rtol=1e-10, atol=1e-10)
    # The statistics of the norms took the same step: evaluation agrees after it too.
    torch.testing.assert_close(model.eval()(x), supernet.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_plain_weights_follow_their_channels(build: Callable[[], nn.Module]) -> None:
    """With every dilation at (1, 1) but the assignment shuffled, the network must not change."""
    net = seeded(build).eval()
    pattern = found_pattern(net)
    model = apply_pattern(net, pattern)
    for module in model.modules():
        if isinstance(module, ICConv2d):
            counts = tuple(((1, 1), count) for _, count in module.pattern.branches)
            object.__setattr__(module.pattern, "branches", counts)
    torch.testing.assert_close(model(image()), net(image()), rtol=1e-10, atol=1e-10)
