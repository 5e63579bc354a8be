# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from search import DilationSpace, SearchTask
from search.assignment import BranchLimits
from search.gains import Gains, measure_gains
from search.strategies import GradientStrategy, PlainTask
from search.strategies.gradient import moved

SPACE = DilationSpace(9)


class Net(nn.Module):
    """Two stages, strided and grouped layers, an in-place ReLU on a convolution's own output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(nn.functional.relu(self.a(x), inplace=True)))


def plain_task(net: nn.Module, batches: list[Any]) -> PlainTask:
    return PlainTask(net, net, lambda: batches, lambda model, x: model(x).pow(3).mean())


def units(task: PlainTask) -> dict[str, int]:
    return dict(SearchTask.of_plain(task, SPACE).units)


def test_gains_equal_the_gradients_of_kernels_that_are_zero_outside() -> None:
    net = Net().double()
    batches = [torch.randn(n, 3, 13, 10).double() for n in (2, 3)]
    found = measure_gains(plain_task(net, batches), SPACE, {"a": 8, "b": 4})
    net.eval()
    big = {name: pad(getattr(net, name).weight.detach(), [3] * 4).requires_grad_() for name in "ab"}
    for x in batches:
        y = conv2d(x, big["a"], net.a.bias, 1, 4).relu()
        net.norm(conv2d(y, big["b"], net.b.bias, 2, 4, 1, 4)).pow(3).mean().backward()
    for name, count in (("a", 8), ("b", 4)):
        power = big[name].grad.square().sum(1).flatten(1)
        outer = SPACE.tap_masks().flatten(1).clone()
        outer[:, 40] = False
        norm = getattr(net, name).weight.detach().square().sum((1, 2, 3))
        gain = torch.einsum("ot,dt->od", power, outer.double()) * norm[:, None]
        gain = gain.unflatten(0, (count, -1)).mean(1)
        torch.testing.assert_close(torch.from_numpy(found[name].gain), gain / gain.max(), rtol=0, atol=2e-9)
    assert found["a"].size == (13, 10) and found["b"].size == (7, 5)
    assert net.a.weight.grad is None and not net.a._forward_hooks


def test_the_units_with_most_to_gain_move_to_their_best_dilation() -> None:
    gain = torch.zeros(4, 16)
    gain[:, 0] = 9  # (1, 1) itself is no place to move to
    gain[0, 5], gain[2, 7], gain[2, 1], gain[3, 2] = 0.5, 0.9, 0.8, 0.1
    gains = {"x": Gains(gain.numpy().astype(float), (9, 9)), "y": Gains(gain.numpy().astype(float), (5, 5))}
    pattern = moved(SPACE, gains, [(9, 9), (5, 5)], [0.5, 0.75])
    c = SPACE.candidates
    assert pattern.layers[0].assignment == (c[5], (1, 1), c[7], (1, 1))
    assert pattern.layers[1].assignment == (c[5], (1, 1), c[7], c[2])


@pytest.mark.parametrize(
    ("limits", "share", "sizes"),
    [
        (BranchLimits(4), 0.5, [8, 8]),  # (8, 4, 4) is allowed, but one dilation gains most
        (BranchLimits(4), 0.3, [12, 4]),
        (BranchLimits(16), 0.4, [16]),
        (BranchLimits(1, min_branch=6), 0.2, [10, 6]),
        (BranchLimits(1, max_branches=2), 0.25, [12, 4]),
    ],
)
def test_moved_units_fill_whole_branches_with_most_to_gain(
    limits: BranchLimits, share: float, sizes: list[int]
) -> None:
    gain = np.random.default_rng(0).uniform(0, 0.1, (16, 16))
    gain[:, 5] += 0.5
    gain[3, 6] = 0.9  # alone
    layer = moved(
        SPACE, {"x": Gains(gain, (9, 9))}, [(9, 9)], [share], {"x": limits.of_layer(16, 16)}
    ).layers[0]
    assert sorted((count for _, count in layer.branches), reverse=True) == sizes
    assert len(sizes) == 1 or set(layer.assignment or ()) == {(1, 1), SPACE.candidates[5]}


def test_limits_that_leave_no_branch_to_move_to_are_refused() -> None:
    task = SearchTask.of_plain(plain_task(Net(), [torch.randn(2, 3, 13, 10)]), SPACE)
    with pytest.raises(ValueError, match="at least 2 branches"):
        GradientStrategy(limits=BranchLimits(max_branches=1)).check(task)
    with pytest.raises(ValueError, match="a: the channel multiple must be at most its 8 channels, got 16"):
        GradientStrategy(limits=BranchLimits(16)).search(task)


def test_a_task_that_looks_far_moves_channels_far() -> None:
    """The target is a pixel four columns to the right: only taps there have a gradient to speak of."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 3, 1))
    batches = [torch.randn(4, 3, 24, 24) for _ in range(4)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x)[..., :-4] - x[..., 4:]).square().mean()

    task = SearchTask.of_plain(PlainTask(net, net, lambda: batches, loss), SPACE)
    pattern = GradientStrategy((1.0,)).search(task)
    assert {dx for (_, dx), _ in pattern.layers[0].branches} == {4}
    chosen = GradientStrategy(validation_steps=60).search(task)
    assert chosen.meta["moved_shares"][0] > 0
    tried = chosen.meta["validation_loss"]
    assert tried[0][0] == chosen.meta["moved_shares"][0] and tried[0][-1] < tried[-1][-1]


def test_shares_of_stages() -> None:
    task = SearchTask.of_plain(plain_task(Net(), [torch.randn(2, 3, 12, 12)]), SPACE)
    pattern = GradientStrategy((0.25, 1.0)).search(task)
    assert [layer.plain_share for layer in pattern.layers] == [0.75, 0.0]
    assert pattern.meta["moved_shares"] == [0.25, 1.0]


def test_frozen_weights_have_gains_too() -> None:
    net = Net()
    batches = [torch.randn(2, 3, 12, 12)]
    free = measure_gains(plain_task(net, batches), SPACE, {"a": 8, "b": 4})
    net.a.requires_grad_(False)
    frozen = measure_gains(plain_task(net, batches), SPACE, {"a": 8, "b": 4})
    assert all((free[name].gain == frozen[name].gain).all() for name in "ab")


def test_bad_requests_are_refused() -> None:
    task = SearchTask.of_plain(plain_task(Net(), [torch.randn(2, 3, 12, 12)]), SPACE)
    with pytest.raises(ValueError, match=r"shares of moved units must lie between 0 and 1, got \[1\.5\]"):
        GradientStrategy((1.5,))
    with pytest.raises(ValueError, match="shares must be one, or 2 for the stages; got 3"):
        GradientStrategy((0.5, 0.5, 0.5)).search(task)
    with pytest.raises(ValueError, match="needs a trained plain network, got none"):
        GradientStrategy().search(SearchTask(SPACE, {"a": 8}))
    with pytest.raises(ValueError, match="at least 4, got 1"):
        GradientStrategy(validation_steps=2).search(task)
    with pytest.raises(ValueError, match="a: no batch of the calibration data ran this layer"):
        measure_gains(plain_task(Net(), []), SPACE, {"a": 8})
    with pytest.raises(ValueError, match="no searchable layer: the network has no 3x3 convolution"):
        SearchTask.of_plain(plain_task(nn.Conv2d(3, 4, 1), []), SPACE)
