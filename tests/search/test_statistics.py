# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from ic_conv.benchmark.measure import peak_memory
from search import DilationSpace, convert_to_supernet
from search.statistics import collect, images_of
from search.supernet import super_layers


def supernet(stride: int = 1, groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 1)
    grown = nn.Conv2d(4, 8, 3, stride=stride, padding=1, groups=groups)
    return convert_to_supernet(nn.Sequential(first, nn.ReLU(), grown).double(), 9)


def images(count: int, height: int = 13, width: int = 10) -> Tensor:
    return torch.randn(
        count, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (3, 2)])
def test_moments_equal_those_of_all_unfolded_windows(stride: int, groups: int) -> None:
    network, data = supernet(stride, groups), images(6)
    moments = collect(network, data.split(2), DilationSpace(9))["2"]
    with torch.no_grad():
        windows = unfold(network[:2](data), 9, padding=4, stride=stride)
    windows = windows.transpose(1, 2).flatten(0, 1).unflatten(1, (4, 9, 9))
    torch.testing.assert_close(moments.mean, windows.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moments.square, windows.square().mean(0), rtol=1e-10, atol=1e-12)
    assert moments.stride == (1.0, 1.0) and moments.residual is None


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 2)])
def test_residuals_equal_the_variance_of_the_difference(stride: int, groups: int) -> None:
    network, data, space = supernet(stride, groups), images(6), DilationSpace(9)
    moments = collect(network, [data], space, residuals=True)["2"]
    layer = super_layers(network)["2"]
    with torch.no_grad():
        full = network(data)
        inner = network[:2](data)
        for index, mask in enumerate(space.tap_masks()):
            kept = torch.conv2d(inner, layer.weight * mask, layer.bias, layer.stride, 4, 1, groups)
            expected = (full - kept).transpose(0, 1).flatten(1).var(1, correction=0)
            torch.testing.assert_close(moments.residual[:, index], expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(moments.variance, full.transpose(0, 1).flatten(1).var(1, correction=0))


def test_batches_of_several_sizes_and_kinds_add_up() -> None:
    network, space = supernet(), DilationSpace(9)
    a, b = images(2), images(3, 7, 21)
    mixed = collect(network, [(a, "label"), {"inputs": b}], space)["2"]
    alone = [(collect(network, [x], space)["2"], x.numel() / 3) for x in (a, b)]
    expected = sum(m.mean * n for m, n in alone) / sum(n for _, n in alone)
    torch.testing.assert_close(mixed.mean, expected, rtol=1e-10, atol=1e-12)


def test_the_pass_leaves_no_trace() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)).train()
    network = convert_to_supernet(network, 5)
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    collect(network, [torch.randn(2, 3, 8, 8)], DilationSpace(5))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert network.training and network[0].training and not network[1].training
    assert not network[1]._forward_hooks


def test_dead_taps_outside_small_maps_count_as_zeros() -> None:
    network = convert_to_supernet(nn.Conv2d(3, 4, 3, padding=1), 9)
    square = collect(network, [torch.ones(1, 3, 2, 2)], DilationSpace(9))[""].square
    assert square[0, 4, 4] == 1 and square[0, 4, 5] == 0.5 and square[0, 3, 3] == 0.25
    assert square[0, 4, 6] == 0


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_bad_requests_are_refused() -> None:
    space = DilationSpace(9)
    with pytest.raises(ValueError, match="no grown layer"):
        collect(nn.Conv2d(3, 4, 3), [], space)
    with pytest.raises(ValueError, match="calibration data is empty"):
        collect(supernet(), [], space)
    with pytest.raises(ValueError, match="unused: the network never ran this grown layer"):
        collect(convert_to_supernet(Skipping(), 9), [torch.ones(1, 3, 9, 9)], space)
    with pytest.raises(TypeError, match="must hold images"):
        images_of("a.jpg")


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    network, space = supernet().float(), DilationSpace(9)

    def peak(batches: int) -> int:
        stream = (torch.randn(16, 3, 64, 64) for _ in range(batches))  # 0.75 MiB each
        return peak_memory(lambda: collect(network, stream, space), torch.device("cpu")) or 0

    peak(8)
    few, many = peak(8), peak(64)
    assert many < few + 16 * 2**20, f"{few / 2**20:.0f} MiB for 8 batches, {many / 2**20:.0f} MiB for 64"
