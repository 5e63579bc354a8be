# SPDX-License-Identifier: Apache-2.0
"""fuse: the same results without batch norms, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ic_conv import DilationPattern, LayerPattern, apply_pattern, fuse, ic_resnet50
from ic_conv.layers import ICConv2d
from ic_conv.models.resnet import Bottleneck, ResNet

ZOO = Path(__file__).parents[2] / "pattern_zoo" / "scattered_digits"
PATTERN = {(1, 1): 5, (2, 3): 2, (1, 4): 9}


class Untraceable(nn.Module):
    """A network that torch.fx cannot trace, with parts that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.parts = nn.ModuleList([nn.Sequential(ICConv2d(16, 16, pattern=PATTERN), nn.BatchNorm2d(16))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x if x.sum() > 1e30 else self.parts[0][1](self.parts[0][0](x))


class Shared(nn.Module):
    """Everything that must not be folded: two readers, two calls, a shared weight, a shared norm."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.a = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.called_twice, self.b, self.c = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.one, self.other, self.d = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.other.weight = self.one.weight
        self.first, self.second, self.norm = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read_twice(x)
        x = self.a(y) + y
        x = self.b(self.called_twice(x)) + self.c(self.called_twice(x + 1))
        x = self.d(self.one(x)) + self.other(x)
        return self.norm(self.first(x)) + self.norm(self.second(x))


def reordered() -> nn.Module:
    layer = ICConv2d(16, 16, bias=False, pattern=PATTERN)
    layer.output_order = torch.randperm(16)
    return nn.Sequential(layer, nn.BatchNorm2d(16))


def slim_resnet() -> nn.Module:
    """A bottleneck network of 16 channels, each 3x3 layer with a pattern that moves channels."""
    net = ResNet(Bottleneck, (1, 1, 1, 1), 10, width=16, stem_pool=False)
    layers = [
        LayerPattern.from_counts({(1, 1): n // 2, (2, 1): n // 2 - 3, (1, 2): 3}) for n in (16, 32, 64, 128)
    ]
    return apply_pattern(net, DilationPattern(tuple(layers), kernel=5))


def with_statistics(net: nn.Module, x: Tensor) -> nn.Module:
    """The network in evaluation mode, with norms that do something."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.7
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.2, 1.5)
    with torch.no_grad():
        net.train()(x)
    return net.eval()


def count(net: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in net.modules())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("build", "channels", "norms", "rectified"),
    [
        (lambda: nn.Sequential(ICConv2d(16, 16, pattern=PATTERN), nn.BatchNorm2d(16), nn.ReLU()), 16, 0, 1),
        (lambda: nn.Sequential(ICConv2d(16, 16, pattern=PATTERN), nn.Identity(), nn.ReLU()), 16, 0, 1),
        (
            lambda: nn.Sequential(ICConv2d(16, 16, pattern=PATTERN), nn.BatchNorm2d(16, affine=False)),
            16,
            0,
            0,
        ),
        (lambda: nn.Sequential(nn.Conv2d(16, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()), 16, 0, 0),
        (reordered, 16, 0, 0),
        (lambda: nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)), 16, 1, 0),
        (Untraceable, 16, 0, 0),
        (Shared, 16, 5, 0),
        (slim_resnet, 3, 0, 0),
    ],
    ids=[
        "norm and relu",
        "relu",
        "no affine",
        "plain",
        "reordered",
        "batch statistics",
        "untraceable",
        "shared",
        "net",
    ],
)
def test_computes_the_same(
    build: Callable[[], nn.Module], channels: int, norms: int, rectified: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, channels, 13, 12)
    net = with_statistics(build(), x).to(memory_format=layout)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=layout)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fused = fuse(net)
    assert count(fused, nn.BatchNorm2d) == norms
    assert sum(getattr(module, "relu", None) is True for module in fused.modules()) == rectified
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    expected = net(x).detach()
    for _ in range(2):
        torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(
        fused.double()(x.double()), net.double()(x.double()).detach(), rtol=1e-6, atol=1e-6
    )
    net.float()
    assert net.state_dict().keys() == before.keys() and all(p.requires_grad for p in net.parameters())
    torch.testing.assert_close(dict(net.state_dict()), before)


def test_folds_the_traceable_parts_of_an_untraceable_network(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ic_conv.fuse"):
        fused = fuse(Untraceable())
    assert isinstance(fused.stem[1], nn.Identity) and isinstance(fused.parts[0][1], nn.Identity)
    assert "stem.1, parts.0.1" in caplog.text


@pytest.mark.slow
def test_ic_resnet50_compiles_to_one_graph() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 48, 48)
    pattern = DilationPattern.load(ZOO / "ic_resnet50_k9.json")
    net = with_statistics(ic_resnet50(pattern=pattern, num_classes=10), x)
    for module in net.modules():
        if isinstance(module, Bottleneck):
            module.bn3.weight.data.mul_(0.2)  # else 16 blocks amplify float32's rounding
    expected = net(x).detach()
    compiled = torch.compile(fuse(net), fullgraph=True, backend="aot_eager")
    difference = (compiled(x) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
