# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs against the published tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ic_conv.complexity import Complexity, count, main
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.layers.involution2d import Involution2d, conv_bn_relu
from ic_conv.models import cednet38, cednet50, ic_resnet50, rednet50
from ic_conv.models import rednet as rednets
from ic_conv.models.resnet import Bottleneck, ResNet


def printed(complexity: Complexity, digits: tuple[int, int]) -> tuple[float, float]:
    """Millions of parameters and GFLOPs, rounded as a table prints them."""
    return round(complexity.params / 1e6, digits[0]), round(complexity.flops / 1e9, digits[1])


@pytest.mark.parametrize(
    ("name", "params", "flops"),
    [
        ("rednet26", 9.23, 1.73),
        ("rednet38", 12.39, 2.22),
        ("rednet50", 15.54, 2.71),
        ("rednet101", 25.65, 4.74),
        ("rednet152", 33.99, 6.79),
    ],
)
def test_rednet(name: str, params: float, flops: float) -> None:
    assert printed(count(rednets.rednet(name)), (2, 2)) == (params, flops)


# The published table prints ResNet-101's 44.55 and 7.85 as 44.6 and 7.9.
@pytest.mark.parametrize(
    ("blocks", "params", "flops"),
    [
        ((1, 2, 4, 1), 13.7, 2.36),
        ((2, 3, 5, 2), 19.6, 3.24),
        ((3, 4, 6, 3), 25.6, 4.12),
        ((3, 4, 23, 3), 44.5, 7.85),
        ((3, 8, 36, 3), 60.2, 11.58),
    ],
)
def test_resnet(blocks: tuple[int, ...], params: float, flops: float) -> None:
    assert printed(count(ResNet(Bottleneck, blocks)), (1, 2)) == (params, flops)


def test_cednet50() -> None:
    assert printed(count(cednet50()), (1, 1)) == (16.3, 2.9)
    assert printed(count(cednet50(channel_reduction=None)), (2, 2)) == (16.18, 2.86)


def test_cednet38_is_not_the_published_row() -> None:
    """That row, 12.40 M and 2.2 G, is RedNet-38's: a 9x9 window alone adds half a million parameters."""
    assert printed(count(cednet38()), (2, 2)) == (12.96, 2.34)


@pytest.mark.parametrize(
    ("options", "params", "flops"),
    [
        ({"kernel_size": 3}, 14.7, 2.4),
        ({"kernel_size": 5}, 15.1, 2.4),  # published as 2.5; 2.441 here
        ({"kernel_size": 7}, 15.5, 2.6),
        ({"kernel_size": 9}, 16.2, 2.7),
        ({"group_channels": 1}, 30.2, 5.0),
        ({"group_channels": 4}, 18.5, 3.0),
        ({"group_channels": None}, 14.6, 2.4),
        ({"kernel_generation": "linear"}, 18.1, 3.0),
        ({"reduction": 1}, 19.4, 3.2),
        ({"reduction": 16}, 14.6, 2.4),
    ],
)
def test_ablations(options: dict[str, Any], params: float, flops: float) -> None:
    """The tables' parameters are this network's; their FLOPs come out with ResNet's 7x7 stem."""
    net = rednet50(**options)
    assert printed(count(net), (1, 1))[0] == params
    net.stem = conv_bn_relu(3, 64, 7, stride=2)
    assert printed(count(net), (1, 1))[1] == flops


def test_rule_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),  # 8 x 3 x 3 outputs of 18 products and a bias
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 2, 4, stride=2, padding=1, bias=False),  # 8 x 3 x 3 inputs into 2 x 16
        nn.Flatten(),
        nn.Linear(72, 10),
    )
    counted = count(net, (4, 5, 6))
    assert [layer.flops for layer in counted.layers] == [72 * 19, 144, 72, 72 * 32, 730]
    assert [layer.name for layer in counted.layers] == ["0", "1", "2", "3", "5"]
    assert [layer.params for layer in counted.layers] == [152, 16, 0, 256, 730]
    assert counted.flops == 72 * 19 + 144 + 72 + 72 * 32 + 730


def test_involution_by_hand() -> None:
    counted = count(Involution2d(32, kernel_size=3, stride=2, kernel_generation="linear"), (32, 5, 6))
    assert {layer.name: layer.flops for layer in counted.layers} == {
        "": 9 * 32 * 9,  # 9 products for 32 channels at 3 x 3 positions
        "conv2.conv": 18 * 9 * 33,
    }


def test_a_pattern_costs_nothing() -> None:
    plain = nn.Conv2d(8, 8, 3, padding=1)
    inception = ICConv2d(8, 8, 3, pattern={(1, 1): 5, (2, 3): 3})
    assert count(inception, (8, 9, 9)).flops == count(plain, (8, 9, 9)).flops
    assert count(inception, (8, 9, 9)).params == count(plain, (8, 9, 9)).params


def test_shared_modules_count_every_call_but_their_parameters_once() -> None:
    conv = nn.Conv2d(4, 4, 1, bias=False)
    counted = count(nn.Sequential(conv, conv), (4, 2, 2))
    assert (counted.params, counted.flops) == (16, 2 * 64)


def test_the_model_stays_as_it_was() -> None:
    net = ic_resnet50(width=8, stem_pool=False).train()
    net.layer1.eval()
    mean = net.bn1.running_mean.clone()  # type: ignore[union-attr]
    count(net, (3, 32, 32))
    assert net.training and net.layer4.training and not net.layer1.training
    assert torch.equal(net.get_buffer("bn1.running_mean"), mean)
    assert not any(module._forward_hooks for module in net.modules())


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rednet50", "ic_resnet50", "--image-size", "224"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rednet50             15.54 M params, 2.714 GFLOPs",
        "ic_resnet50          25.56 M params, 4.121 GFLOPs",
    ]
    assert main(["rednet26", "--image-size", "32", "64", "--num-classes", "10", "--layers"]) == 0
    assert "stem.1                                   Involution2d" in capsys.readouterr().out


def test_command_names_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["rednet51"])
    assert stop.value.code == 2
    assert "rednet50" in capsys.readouterr().err
