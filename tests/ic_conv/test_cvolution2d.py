# SPDX-License-Identifier: Apache-2.0
"""C-volution: the spatial branch times the channel branch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from ic_conv.layers.cvolution2d import CVolution2d
from ic_conv.layers.involution2d import Involution2d


def test_output_is_the_involution_gated_by_the_global_context() -> None:
    torch.manual_seed(0)
    layer = CVolution2d(32, kernel_size=3, stride=2, group_channels=8, channel_reduction=4).double().eval()
    spatial = Involution2d(32, kernel_size=3, stride=2, group_channels=8).double().eval()
    spatial.load_state_dict(layer.spatial.state_dict())
    x = torch.randn(2, 32, 7, 5, dtype=torch.float64)
    state = layer.state_dict()
    hidden = x.mean((2, 3)) @ state["channel.reduce.weight"][:, :, 0, 0].T + state["channel.reduce.bias"]
    gate = hidden.relu() @ state["channel.expand.weight"][:, :, 0, 0].T + state["channel.expand.bias"]
    torch.testing.assert_close(layer(x), spatial(x) * gate.sigmoid()[:, :, None, None])


def test_window_and_gate_have_the_published_sizes() -> None:
    layer = CVolution2d(64)
    assert layer.spatial.kernel_size == (9, 9)
    assert layer.get_parameter("channel.reduce.weight").shape == (4, 64, 1, 1)


def test_channel_branch_is_an_option() -> None:
    layer = CVolution2d(16, kernel_size=3, channel_reduction=None).eval()
    x = torch.randn(1, 16, 6, 6)
    assert torch.equal(layer(x), layer.spatial(x))
    assert not any(name.startswith("channel") for name in layer.state_dict())


def test_spatial_options_reach_the_involution() -> None:
    pattern = {(1, 1): 1, (2, 1): 3}
    layer = CVolution2d(
        16, group_channels=4, kernel_generation="linear", pattern=pattern, dtype=torch.float64
    )
    assert layer.spatial.kernel_generation == "linear"
    assert layer.spatial.dilations == ((1, 1), (2, 1), (2, 1), (2, 1))
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}


def test_gradients() -> None:
    torch.manual_seed(0)
    layer = CVolution2d(4, kernel_size=3, stride=2, group_channels=2, channel_reduction=2).double()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_copies_pickles_and_compiles() -> None:
    layer = CVolution2d(16, kernel_size=3).eval()
    x = torch.randn(1, 16, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_autocast() -> None:
    layer = CVolution2d(16, kernel_size=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 16, 5, 5)).dtype == torch.bfloat16


def test_empty_batch() -> None:
    assert CVolution2d(16, stride=2)(torch.zeros(0, 16, 5, 5)).shape == (0, 16, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_reduction": 32}, "channel_reduction must be between 1 and channels, 16; got 32"),
        ({"channel_reduction": 0}, "channel_reduction must be between 1 and channels, 16; got 0"),
        ({"kernel_size": 8}, "kernel sizes must be odd"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CVolution2d(16, **options)
