# SPDX-License-Identifier: Apache-2.0
"""Involutions are searched like convolutions: their windows grow, and each group finds a dilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from ic_conv import DilationPattern, Involution2d, LayerPattern, apply_pattern, cednet38, rednet26
from search import STRATEGIES, DilationSpace, SearchTask, convert_to_supernet
from search.criteria import CRITERIA
from search.statistics import collect
from search.supernet import SuperInvolution2d, super_layers


def one_layer(kernel: int = 3, stride: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Involution2d(16, kernel, stride, group_channels=4)).double()


@pytest.mark.parametrize(("base", "kernel", "stride"), [(3, 9, 1), (3, 9, 2), (7, 13, 1)])
def test_inflated_window_computes_what_the_layer_did(base: int, kernel: int, stride: int) -> None:
    network = one_layer(base, stride).eval()
    supernet = convert_to_supernet(network, kernel, base_kernel=base, init="inflate")
    assert isinstance(supernet[0], SuperInvolution2d) and supernet[0].kernel_size == (kernel, kernel)
    images = torch.randn(2, 16, 15, 14, dtype=torch.float64)
    torch.testing.assert_close(supernet(images), network(images), rtol=1e-10, atol=1e-10)


def keep_only(supernet: nn.Module, pattern: DilationPattern) -> None:
    """Makes each group generate zeros outside the taps of its dilation."""
    space = DilationSpace(pattern.kernel, pattern.base_kernel)
    masks = dict(zip(space.candidates, space.tap_masks().flatten(1), strict=True))
    for layer, grown in zip(pattern.layers, super_layers(supernet).values(), strict=True):
        rows = torch.cat([masks[dilation] for dilation in layer.assignment or ()])
        for parameter in grown.conv2.parameters():
            parameter.data[~rows] = 0


@pytest.mark.parametrize(
    ("make", "base", "kernel"),
    [
        (lambda: one_layer(3, 2), 3, 9),
        (lambda: rednet26(out_indices=(3,)).double(), 7, 13),
        (lambda: cednet38(num_classes=5).double(), 9, 17),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_cropped_network_equals_its_supernet(
    make: Callable[[], nn.Module], base: int, kernel: int, training: bool
) -> None:
    supernet = convert_to_supernet(make(), kernel, base_kernel=base).train(training)
    pattern = STRATEGIES["random"]().search(SearchTask.of(supernet, seed=3))
    keep_only(supernet, pattern)
    cropped = apply_pattern(supernet, pattern)
    assert not super_layers(cropped) and any(isinstance(m, Involution2d) for m in cropped.modules())
    images = torch.randn(2, 16 if isinstance(supernet, nn.Sequential) else 3, 33, 33, dtype=torch.float64)
    torch.testing.assert_close(cropped(images), supernet(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [1, 2])
def test_moments_equal_those_of_every_tap_on_its_own(stride: int) -> None:
    supernet, space = convert_to_supernet(one_layer(3, stride), 5).eval(), DilationSpace(5)
    data = torch.randn(3, 16, 9, 8, dtype=torch.float64)
    moments = collect(supernet, data.split(1), space, residuals=True)["0"]
    with torch.no_grad():
        kernel = supernet[0].generate_kernel(data).repeat_interleave(4, dim=1)  # (N, C, K, K, Ho, Wo)
        windows = pad(data, [2] * 4).unfold(2, 5, stride).unfold(3, 5, stride)  # (N, C, Ho, Wo, K, K)
        added = kernel * windows.movedim((4, 5), (2, 3))
    torch.testing.assert_close(moments.tap_means(), added.mean((0, 4, 5)).flatten(1))
    torch.testing.assert_close(moments.tap_energies(), added.square().mean((0, 4, 5)).flatten(1))
    first = added[:1]  # residuals come from the first batch of eight
    for index, mask in enumerate(space.tap_masks()):
        left_out = (first * ~mask[:, :, None, None]).sum((2, 3)).transpose(0, 1).flatten(1)
        torch.testing.assert_close(moments.residual[:, index], left_out.var(1, correction=0))


@pytest.mark.parametrize("criterion", ["energy", "mse"])
def test_groups_find_the_dilation_that_their_kernels_have(criterion: str) -> None:
    supernet = convert_to_supernet(one_layer(), 9)
    planted = ((4, 1), (1, 1), (2, 3), (1, 4))
    layer = replace(LayerPattern.from_assignment(planted), name="0")
    keep_only(supernet, DilationPattern((layer,), 9))
    task = SearchTask.of(supernet, [torch.randn(2, 16, 16, 16, dtype=torch.float64)])
    assert task.units == {"0": 4} and criterion in CRITERIA
    assert STRATEGIES["edo"](criterion=criterion).search(task).layers[0].assignment == planted  # type: ignore[call-arg]


def test_plain_network_takes_the_pattern_as_it_is() -> None:
    network = one_layer()
    pattern = DilationPattern((LayerPattern.from_counts({(1, 1): 3, (2, 4): 1}),), 9)
    dilated = apply_pattern(network, pattern)
    assert dilated[0].dilations == ((1, 1), (1, 1), (1, 1), (2, 4)) and network[0].group_dilations is None
    weights = [module.conv2.conv.weight for module in (dilated[0], network[0])]
    assert torch.equal(*weights)
