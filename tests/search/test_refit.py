# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from ic_conv import DilationPattern, apply_pattern
from ic_conv.layers import ICConv2d, Involution2d
from search import STRATEGIES, SearchTask, convert_to_supernet, edo
from search.refit import estimate_batch_norms, warm_start
from search.space import DilationSpace
from search.statistics import collect
from search.strategies import EDOStrategy

SPACE = DilationSpace(9)


def network(bias: bool = False, norm: bool = True) -> nn.Module:
    """A strided, a grouped and a strided grouped layer; some channels must be put back into order."""
    torch.manual_seed(0)
    convs = [
        nn.Conv2d(3, 8, 3, 2, 1, bias=bias),
        nn.Conv2d(8, 8, 3, 1, 1, groups=4, bias=bias),
        nn.Conv2d(8, 6, 3, 2, 1, groups=2, bias=bias),
    ]
    return nn.Sequential(
        *[
            part
            for conv in convs
            for part in (conv, nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity(), nn.ReLU())
        ]
    ).double()


def images(count: int = 24, size: int = 23) -> Tensor:
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    return nn.functional.avg_pool2d(noise, 3, 1, 1)  # as correlated as images are


def random_pattern(supernet: nn.Module) -> DilationPattern:
    return STRATEGIES["random"]().search(SearchTask.of(supernet, seed=3))


@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (False, True)])
def test_each_layer_gets_the_least_squares_weights(bias: bool, norm: bool) -> None:
    supernet = convert_to_supernet(network(bias, norm), 9).eval()
    pattern, data = random_pattern(supernet), images()
    fitted = warm_start(supernet, pattern, lambda: [data], ridge=1e-12)
    centred = bias or norm
    compared = 0
    x, convs = data, [index for index, layer in enumerate(supernet) if isinstance(layer, nn.Conv2d)]
    for layer, pattern_layer in zip(convs, pattern.layers, strict=True):
        grown, found = supernet[layer], fitted[layer]
        assert isinstance(found, ICConv2d)
        size = grown.out_channels // pattern_layer.units
        order = (torch.tensor(pattern_layer.order())[:, None] * size + torch.arange(size)).flatten()
        with torch.no_grad():
            y = grown(x)
            columns = nn.functional.unfold(x, 9, padding=4, stride=grown.stride)
        rows = columns.transpose(1, 2).flatten(0, 1).unflatten(1, (grown.in_channels, 81))
        inputs = grown.in_channels // grown.groups
        for position, channel in enumerate(order.tolist()):
            dilation = (pattern_layer.assignment or ())[channel // size]
            group = channel // (grown.out_channels // grown.groups)
            taps = SPACE.taps[SPACE.candidates.index(dilation)]
            under = rows[:, group * inputs : (group + 1) * inputs, taps].flatten(1)
            if centred:
                under = torch.cat([under, torch.ones(len(under), 1).double()], 1)
            target = y[:, channel].flatten()[:, None]
            solution = torch.linalg.lstsq(under, target, driver="gelsd").solution[:, 0]
            row = found.weight.detach()[position]
            offset = found.bias.detach()[position : position + 1] if bias else solution[row.numel() :]
            mine = torch.cat([row.flatten(), offset])
            torch.testing.assert_close(under @ mine, under @ solution, rtol=1e-5, atol=1e-6)
            if torch.linalg.matrix_rank(under) == under.shape[1]:  # an input may be dead after its ReLU
                torch.testing.assert_close(mine, solution, rtol=1e-4, atol=1e-5)
                compared += 1
        with torch.no_grad():
            for part in supernet[layer : layer + 3]:
                x = part(x)
    assert compared > 11


def test_refit_is_nearer_to_the_supernet_than_copying() -> None:
    supernet = convert_to_supernet(network(norm=True), 9)
    data = [images(), images(size=31)]
    estimate_batch_norms(supernet, data)
    pattern = random_pattern(supernet)
    before = copy.deepcopy(supernet.state_dict())
    error = {}
    for init in ("crop", "refit"):
        found = warm_start(supernet, pattern, lambda: data, init=init).eval()
        with torch.no_grad():
            error[init] = sum((found(x) - supernet.eval()(x)).square().mean().item() for x in data)
    assert error["refit"] < 0.9 * error["crop"]
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_crop_copies_and_only_batch_norms_move() -> None:
    supernet = convert_to_supernet(network(), 9)
    pattern = random_pattern(supernet)
    cropped, started = (
        apply_pattern(supernet, pattern),
        warm_start(supernet, pattern, lambda: [images()], init="crop"),
    )
    differ = {
        name
        for name, value in started.state_dict().items()
        if not torch.equal(value, cropped.state_dict()[name])
    }
    assert differ == {
        f"{i}.{name}" for i in (1, 4, 7) for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_a_pattern_without_assignment_or_names_is_taken_in_branch_order() -> None:
    supernet = convert_to_supernet(network(), 9)
    named = random_pattern(supernet)
    bare = DilationPattern(tuple(type(layer)(layer.branches) for layer in named.layers), 9)
    found = warm_start(supernet, bare, lambda: [images()])
    assert [m.pattern.branches for m in found.modules() if isinstance(m, ICConv2d)] == [
        layer.branches for layer in named.layers
    ]


def test_planted_dilations_are_found_by_refit() -> None:
    """Kernels that are zero but for a dilated one: the fit leaves nothing there, and something elsewhere."""
    supernet = convert_to_supernet(nn.Sequential(nn.Conv2d(4, 16, 3, padding=1, bias=False)).double(), 9)
    with torch.no_grad():
        for channel, mask in enumerate(SPACE.tap_masks()):
            supernet[0].weight[channel] *= mask
    x = nn.functional.avg_pool2d(torch.randn(16, 4, 20, 20).double(), 3, 1, 1)
    pattern = edo(supernet, [x], criterion="refit")
    assert pattern.layers[0].assignment == SPACE.candidates


def test_batch_norms_are_estimated_as_means_over_batches() -> None:
    norm = nn.BatchNorm2d(3, momentum=0.3).double()
    model = nn.Sequential(norm, nn.Dropout(0.5)).train()
    data = [images(4), images(6) + 1]
    estimate_batch_norms(model, data)
    expected = torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.momentum == 0.3 and norm.training


class OneInvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.inv = Involution2d(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inv(self.conv(x))


def test_involutions_are_cropped_and_not_selected_by_refit() -> None:
    supernet = convert_to_supernet(OneInvolution(), 9)
    found = warm_start(supernet, random_pattern(supernet), lambda: [images(4).float()])
    assert isinstance(found.conv, ICConv2d) and found.inv.kernel_size == (3, 3)
    with pytest.raises(
        ValueError, match="inv: the criterion refit is for convolutions, this is an involution"
    ):
        EDOStrategy("refit").check(SearchTask.of(supernet))


def test_few_images_are_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    supernet = convert_to_supernet(network(), 9)
    with caplog.at_level(logging.WARNING):
        collect(supernet, [images(1, 9)], SPACE, correlations=True)
    assert len(caplog.messages) == 1
    assert "6: 9 output positions are few for 36 weights per channel" in caplog.text
    caplog.clear()
    collect(supernet, [images()], SPACE, correlations=True)
    assert not caplog.messages


def test_bad_requests_are_refused() -> None:
    supernet = convert_to_supernet(network(), 9)
    pattern = random_pattern(supernet)
    with pytest.raises(ValueError, match="must be one of crop, refit; got 'scratch'"):
        warm_start(supernet, pattern, lambda: [images()], init="scratch")
    for init in ("crop", "refit"):
        with pytest.raises(ValueError, match="calibration data is empty"):
            warm_start(supernet, pattern, list, init=init)
    with pytest.raises(ValueError, match="the pattern has 3 layers"):
        warm_start(convert_to_supernet(nn.Conv2d(3, 4, 3, padding=1), 9), pattern, lambda: [images()])
