# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50, resnext50_32x4d

from search import convert_to_supernet
from search.supernet import SuperConv2d, space_of, super_layers


class UNet(nn.Module):
    """A small one: two levels, skip connection, valid names that repeat nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.bottom = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding="same"), nn.Upsample(scale_factor=2)
        )
        self.up = nn.Conv2d(24, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        return self.up(torch.cat((down, self.bottom(down)), 1))


def timm_resnet26() -> nn.Module:
    return pytest.importorskip("timm").create_model("resnet26", pretrained=False)


NETWORKS: list[tuple[Callable[[], nn.Module], int]] = [
    (resnet18, 16),
    (resnet50, 16),
    (resnext50_32x4d, 16),
    (UNet, 3),
    (timm_resnet26, 8),
]


@pytest.mark.parametrize(("make", "layers"), NETWORKS)
def test_inflated_supernet_computes_what_the_network_did(make: Callable[[], nn.Module], layers: int) -> None:
    torch.manual_seed(0)
    network = make().double().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    supernet = convert_to_supernet(network, 9, init="inflate")
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(supernet(images), network(images), rtol=1e-9, atol=1e-9)
    assert len(super_layers(supernet)) == layers
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items()), (
        "model untouched"
    )


def test_growing_keeps_stride_groups_bias_mode_and_flags() -> None:
    conv = nn.Conv2d(8, 16, 3, stride=(2, 1), padding=1, groups=4).half().eval()
    conv.weight.requires_grad_(False)
    grown = convert_to_supernet(nn.Sequential(conv), 7, inplace=True)[0]
    assert isinstance(grown, SuperConv2d) and not grown.training
    assert (grown.stride, grown.groups, grown.padding, grown.kernel_size) == ((2, 1), 4, (3, 3), (7, 7))
    assert grown.weight.dtype == torch.float16 and not grown.weight.requires_grad
    assert grown.bias is not None and torch.equal(grown.bias, conv.bias) and grown.bias.requires_grad
    assert "base_kernel=3" in repr(grown)


def test_only_plain_base_convolutions_grow() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 7, padding=3),
        nn.Conv2d(8, 8, 3, padding=1, dilation=1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 5, padding=2),
    )
    assert list(super_layers(convert_to_supernet(network, 9))) == ["1"]
    assert list(super_layers(convert_to_supernet(network, 9, base_kernel=5))) == ["6"]


def test_root_and_shared_modules_grow_once() -> None:
    assert isinstance(convert_to_supernet(nn.Conv2d(3, 4, 3, padding=1), 5), SuperConv2d)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    supernet = convert_to_supernet(nn.Sequential(shared, nn.ReLU(), shared), 5)
    assert supernet[0] is supernet[2] and isinstance(supernet[0], SuperConv2d)


def test_filter_chooses_layers() -> None:
    supernet = convert_to_supernet(resnet18(), 9, filter_fn=lambda module, name: name.startswith("layer4"))
    assert list(super_layers(supernet)) == [
        f"layer4.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)
    ]


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: convert_to_supernet(nn.Linear(3, 3), 9), "no searchable layer"),
        (lambda: convert_to_supernet(resnet18(), 9, filter_fn=lambda *_: False), "no searchable layer"),
        (lambda: convert_to_supernet(resnet18(), 8), "got 8"),
        (lambda: convert_to_supernet(resnet18(), 9, init="zeros"), "init must be one of default, inflate"),  # type: ignore[arg-type]
        (lambda: space_of(nn.Linear(3, 3)), "grown layers of one size, got 0 sizes"),
    ],
)
def test_bad_requests_are_refused(call: Callable[[], object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        call()
