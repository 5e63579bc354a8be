# SPDX-License-Identifier: Apache-2.0
"""apply_pattern: the network must compute what the supernet computes with only the chosen taps."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ic_conv.convert import apply_pattern, replace_modules, searchable_layers
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.models.resnet import BasicBlock, Bottleneck, ResNet
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


class NormAct(nn.BatchNorm2d):
    """A norm with values per channel in a module inside it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(channels)
        nn.init.uniform_(self.act.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Entangled(nn.Module):
    """A norm called twice, two convolutions with one weight, and more that must not be permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.norm = nn.BatchNorm2d(8)
        self.tied = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.tied[1].weight = self.tied[0].weight
        self.mix = nn.Conv2d(8, 8, 1, groups=2)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm_act = NormAct(8)
        self.ends = nn.ModuleList(nn.Conv2d(channels, 8, 1) for channels in (3, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convs[0](self.ends[0](x)))
        x = self.norm(self.convs[1](x))
        x = self.tied[1](self.tied[0](self.convs[2](x)))
        x = self.grouped(self.mix(x))
        return self.ends[1](self.norm_act(self.convs[3](x)))


def resnet18() -> nn.Module:
    return ResNet(BasicBlock, (2, 1, 1, 1), 5, width=8)


def resnet50() -> nn.Module:
    return ResNet(Bottleneck, (1, 2, 1, 1), 5, width=8)


def resnext() -> nn.Module:
    return ResNet(Bottleneck, (1, 2, 1, 1), 5, width=8, groups=4, width_per_group=32)


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, num_classes=5, **options)

    build.__name__ = name
    return build


NETWORKS = [resnet18, resnet50, resnext, UNet, Inverted, Untraceable, Entangled]
TIMM = [
    timm_model("resnet10t", channels=(8, 8, 16, 16)),
    timm_model("seresnet18", channels=(8, 8, 16, 16)),
    timm_model("mobilenetv2_035"),
]


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
        others = rng.choices([(1, 1), (1, 3), (4, 1), (2, 4)], k=units - 2)
        assignment = [(4, 1), (1, 3), *others]  # never in branch order
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
def test_equals_the_masked_supernet(build: Callable[[], nn.Module]) -> None:
    net = seeded(build)
    pattern = found_pattern(net)
    supernet = masked_supernet(net, pattern)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    model = apply_pattern(supernet, pattern)
    assert all(torch.equal(before[key], value) for key, value in supernet.state_dict().items())
    assert sum(isinstance(m, ICConv2d) for m in model.modules()) == len(pattern.layers)
    # The last pass shows that the statistics of the norms took the same step in the one before.
    for training in (False, True, False):
        y, expected = (m.train(training)(image()) for m in (model, supernet))
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_plain_weights_follow_their_channels(build: Callable[[], nn.Module]) -> None:
    """Kernels with nothing but a centre are the same at every dilation."""
    net = seeded(build).eval()
    for conv in searchable_layers(net).values():
        conv.weight.data *= torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    model = apply_pattern(net, found_pattern(net))
    torch.testing.assert_close(model(image()), net(image()), rtol=1e-10, atol=1e-10)


def reordered(model: nn.Module) -> dict[str, tuple[bool, bool]]:
    """Which layers gather their input, and which their output."""
    return {
        name: (module.input_order is not None, module.output_order is not None)
        for name, module in model.named_modules()
        if isinstance(module, ICConv2d) and not module.input_order is module.output_order is None
    }


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (resnet50, {}),
        (resnext, {}),
        (resnet18, {f"layer{i}.conv2": (False, True) for i in ("1.0", "1.1", "2.0", "3.0", "4.0")}),
        (UNet, {f"{name}.3": (False, True) for name in ("down", "bottom")}),
        (Inverted, {"middle": (False, True), "last": (False, True)}),
        (TIMM[2], {"conv_stem": (False, True), "blocks.0.0.conv_dw": (True, False)}),
        (Entangled, {f"convs.{i}": (False, True) for i in range(4)} | {"grouped": (True, False)}),
        (Untraceable, {"first": (False, True), "shared": (False, True), "grouped": (True, True)}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_gathers_only_where_neighbours_cannot_follow(
    build: Callable[[], nn.Module], expected: dict[str, tuple[bool, bool]]
) -> None:
    net = seeded(build)
    assert reordered(apply_pattern(net, found_pattern(net))) == expected


def test_without_assignment_weights_stay_the_same_objects() -> None:
    net = resnet50()
    layers = tuple(
        LayerPattern.from_counts({(1, 1): conv.out_channels - 3, (1, 4): 3})
        for conv in searchable_layers(net).values()
    )
    before = dict(net.named_parameters())
    model = apply_pattern(net, DilationPattern(layers, KERNEL), inplace=True)
    assert model is net and reordered(net) == {}
    assert all(before[name] is parameter for name, parameter in net.named_parameters())


def test_keeps_dtype_mode_and_requires_grad() -> None:
    net = UNet().half().to(memory_format=torch.channels_last)
    net.down.eval().requires_grad_(False)
    model = apply_pattern(net, found_pattern(net))
    layers = [module for module in model.modules() if isinstance(module, ICConv2d)]
    for (name, old), new in zip(searchable_layers(net).items(), layers, strict=True):
        frozen = name.startswith("down")
        assert new.training is old.training is not frozen
        assert new.weight.requires_grad is new.bias.requires_grad is not frozen
        assert new.weight.dtype == torch.float16 and new.weight.is_leaf
        assert new.weight.is_contiguous(memory_format=torch.channels_last)
        assert new.branches.device == new.weight.device
    model.load_state_dict(model.state_dict())


def test_draws_no_random_numbers() -> None:
    net = resnet50()
    state = torch.get_rng_state()
    apply_pattern(net, found_pattern(net))
    assert torch.equal(state, torch.get_rng_state())


def test_a_convolution_by_itself() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    pattern = found_pattern(conv)
    model = apply_pattern(conv, pattern, inplace=True)
    assert isinstance(model, ICConv2d)
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    for channel, dilation in enumerate(pattern.layers[0].assignment or ()):
        expected = F.conv2d(
            x, conv.weight[channel : channel + 1], conv.bias[channel : channel + 1], 1, dilation, dilation
        )
        torch.testing.assert_close(model(x)[:, channel : channel + 1], expected)


def test_shared_modules_stay_shared() -> None:
    net = Untraceable()
    model = apply_pattern(net, found_pattern(net))
    assert isinstance(model.shared, ICConv2d) and model.again is model.shared


def test_filter_and_names_choose_layers(caplog: pytest.LogCaptureFixture) -> None:
    net = resnet50()
    names = list(searchable_layers(net))

    def last(module: nn.Module, name: str) -> bool:
        return name.startswith("layer4")

    assert list(searchable_layers(net, filter_fn=last)) == names[-1:]
    count = net.layer4[0].conv2.out_channels
    nameless = DilationPattern((LayerPattern.from_counts({(1, 2): count}),), KERNEL)
    with caplog.at_level(logging.INFO):
        model = apply_pattern(net, nameless, filter_fn=last)
    assert [n for n, m in model.named_modules() if isinstance(m, ICConv2d)] == names[-1:]
    assert names[-1] in caplog.text
    named = DilationPattern((LayerPattern.from_counts({(1, 2): count}, names[-1]),), KERNEL)
    with pytest.raises(ValueError, match=f"layer {names[0]} is not in the pattern"):
        apply_pattern(net, named)


def test_searchable_layers() -> None:
    net = nn.ModuleDict(
        {
            "yes": nn.Conv2d(4, 4, 3, padding=1),
            "same": nn.Conv2d(4, 4, 3, padding="same"),
            "strided": nn.Conv2d(4, 4, 3, 2, 1, groups=2),
            "kernel": nn.Conv2d(4, 4, 5, padding=2),
            "oblong": nn.Conv2d(4, 4, (3, 5), padding=(1, 2)),
            "dilated": nn.Conv2d(4, 4, 3, padding=2, dilation=2),
            "unpadded": nn.Conv2d(4, 4, 3),
            "mode": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "transposed": nn.ConvTranspose2d(4, 4, 3, padding=1),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
            "old norm": nn.utils.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
            "converted": ICConv2d(4, 4, 3, pattern={(1, 1): 4}),
        }
    )
    net["again"] = net["yes"]
    assert list(searchable_layers(net)) == ["yes", "same", "strided"]
    assert list(searchable_layers(net, 5)) == ["kernel"]


def test_base_kernel_of_5() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 5, padding=2, bias=False))
    supernet = nn.Sequential(nn.Conv2d(2, 4, 9, padding=4, bias=False))
    pattern = DilationPattern((LayerPattern(((((2, 1), 4)),), "0"),), 9, 5)
    for model in (net, supernet):
        weight = apply_pattern(model, pattern)[0].weight
        expected = model[0].weight if model is net else model[0].weight[:, :, ::2, 2:7]
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    ("net", "pattern", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 1)),
            DilationPattern((LayerPattern.plain(4),), 9),
            "no layer to convert.*3x3",
        ),
        (resnet50(), DilationPattern((LayerPattern.plain(4),), 9), "1 layers.*5"),
        (nn.Conv2d(3, 5, 3, padding=1), DilationPattern((LayerPattern.plain(4),), 9), "sum to 5, got 4"),
        (nn.Conv2d(3, 5, 9, padding=4), DilationPattern((LayerPattern.plain(5),), 9), "no layer to convert"),
    ],
    ids=["nothing", "layers", "channels", "supernet without names"],
)
def test_refuses_what_does_not_fit(net: nn.Module, pattern: DilationPattern, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_pattern(net, pattern)


def test_nothing_changes_when_refused() -> None:
    net = resnet50()
    before = copy.deepcopy(net.state_dict())
    layers = found_pattern(net).layers
    wrong = (*layers[:-1], LayerPattern.from_assignment([(2, 2)] * 3, layers[-1].name))
    with pytest.raises(ValueError, match="sum to"):
        apply_pattern(net, DilationPattern(wrong, KERNEL), inplace=True)
    assert not any(isinstance(module, ICConv2d) for module in net.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
