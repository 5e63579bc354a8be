# SPDX-License-Identifier: Apache-2.0
"""The involution layer: kernel generation, patterns, checkpoints, precisions, compilation."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ic_conv.layers.involution2d import Involution2d
from ic_conv.pattern import LayerPattern


def by_hand(layer: Involution2d, x: Tensor) -> Tensor:
    """The layer from its parameters, tap by tap, with nothing of the layer's own code."""
    stride, kernel = layer.stride[0], layer.kernel_size[0]
    rows, columns = (math.ceil(size / stride) for size in x.shape[2:])
    pooled = x.new_empty(*x.shape[:2], rows, columns)
    for i in range(rows):
        for j in range(columns):
            window = x[:, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            pooled[:, :, i, j] = window.mean((2, 3))
    state = layer.state_dict()
    hidden = pooled
    if layer.kernel_generation == "bottleneck":
        hidden = torch.einsum("oc,nchw->nohw", state["conv1.conv.weight"][:, :, 0, 0], pooled)
        bn = {name: state[f"conv1.bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")}
        hidden = F.batch_norm(hidden, **bn).relu()
    taps = torch.einsum("oc,nchw->nohw", state["conv2.conv.weight"][:, :, 0, 0], hidden)
    taps = taps + state["conv2.conv.bias"][:, None, None]
    out = torch.zeros(x.shape[0], layer.channels, rows, columns, dtype=x.dtype)
    for channel in range(layer.channels):
        group = channel // layer.group_channels
        dy, dx = layer.dilations[group]
        for u in range(kernel):
            for v in range(kernel):
                tap = taps[:, group * kernel**2 + u * kernel + v]
                for i in range(rows):
                    for j in range(columns):
                        y, z = i * stride + (u - kernel // 2) * dy, j * stride + (v - kernel // 2) * dx
                        if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                            out[:, channel, i, j] += tap[:, i, j] * x[:, channel, y, z]
    return out


def randomised(layer: Involution2d) -> Involution2d:
    """The layer with every parameter and statistic drawn anew, in double precision and evaluation mode."""
    for tensor in layer.double().state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.0)
    return layer.eval()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (6, 6)),
        ({"stride": 2}, (6, 8)),
        ({"stride": 2}, (7, 5)),
        ({"stride": 3}, (7, 8)),
        ({"kernel_generation": "linear", "group_channels": 1}, (4, 5)),
        ({"group_channels": 8, "reduction": 1, "dilation": (2, 1)}, (5, 6)),
        ({"pattern": {(1, 1): 1, (2, 3): 1}}, (6, 7)),
    ],
)
def test_output_equals_the_definition(options: dict[str, Any], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = randomised(Involution2d(8, **{"kernel_size": 3, "group_channels": 4, **options}))
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x))


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"pattern": {(1, 2): 1, (2, 1): 1}}])
def test_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = Involution2d(4, kernel_size=3, group_channels=2, reduction=2, **options).double()
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True), *layer.parameters())
    assert torch.autograd.gradcheck(call, inputs)


def test_even_sizes_pool_as_published() -> None:
    x = torch.randn(1, 4, 6, 8)
    pool = Involution2d(4, group_channels=2, stride=2).pool
    assert torch.equal(pool(x), F.avg_pool2d(x, 2, 2))


def test_checkpoint_keys_are_the_published_ones() -> None:
    layer = Involution2d(64)
    bn = [
        f"conv1.bn.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    assert list(layer.state_dict()) == ["conv1.conv.weight", *bn, "conv2.conv.weight", "conv2.conv.bias"]
    assert layer.get_parameter("conv1.conv.weight").shape == (16, 64, 1, 1)
    assert layer.get_parameter("conv2.conv.weight").shape == (4 * 49, 16, 1, 1)


@pytest.mark.parametrize(
    ("pattern", "dilations"),
    [
        ({(1, 1): 2, (3, 1): 2}, ((1, 1), (1, 1), (3, 1), (3, 1))),
        ({(2, 2): 1, (1, 1): 3, (4, 4): 0}, ((2, 2), (1, 1), (1, 1), (1, 1))),
        (LayerPattern.from_assignment([(1, 2), (1, 1), (1, 2), (1, 1)]), ((1, 2), (1, 1), (1, 2), (1, 1))),
    ],
)
def test_pattern_gives_each_group_its_dilation(pattern: Any, dilations: tuple[tuple[int, int], ...]) -> None:
    layer = Involution2d(8, group_channels=2, pattern=pattern)
    assert layer.dilations == dilations
    assert "(1, 1)" in repr(layer)


def test_checkpoint_tells_its_pattern() -> None:
    plain, dilated = (Involution2d(8, group_channels=4, pattern={d: 2}) for d in ((1, 1), (2, 1)))
    dilated.load_state_dict(plain.state_dict())
    Involution2d(8, group_channels=4, dilation=(2, 1)).load_state_dict(dilated.state_dict())
    for other in (plain, Involution2d(8, group_channels=4, dilation=2)):
        with pytest.raises(RuntimeError, match="group_dilations: must be"):
            other.load_state_dict(dilated.state_dict())


def test_search_may_change_the_pattern_of_a_trained_layer() -> None:
    layer = Involution2d(8, group_channels=4, kernel_size=3)
    before = copy.deepcopy(layer.state_dict())
    layer.set_pattern({(1, 1): 1, (2, 2): 1})
    assert layer.dilations == ((1, 1), (2, 2))
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_return_kernel() -> None:
    layer = Involution2d(8, kernel_size=(3, 5), group_channels=4, stride=2).eval()
    x = torch.randn(1, 8, 7, 6)
    out, kernel = layer(x, return_kernel=True)
    assert kernel.shape == (1, 2, 3, 5, 4, 3)
    assert torch.equal(kernel, layer.generate_kernel(x))
    assert torch.equal(out, layer(x))


def test_copies_and_pickles() -> None:
    layer = Involution2d(8, group_channels=4, pattern={(1, 1): 1, (2, 2): 1}).eval()
    x = torch.randn(1, 8, 5, 5)
    name = "conv2.conv.weight"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.get_parameter(name) is not layer.get_parameter(name)


def test_training_updates_statistics_and_evaluation_does_not() -> None:
    layer = Involution2d(8, group_channels=4)
    x = torch.randn(2, 8, 5, 5)
    mean = layer.get_buffer("conv1.bn.running_mean")
    before = mean.clone()
    layer.eval()(x)
    assert torch.equal(mean, before)
    layer.train()(x)
    assert not torch.equal(mean, before)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training: bool) -> None:
    layer = Involution2d(8, group_channels=4, stride=2).train(training)
    assert layer(torch.zeros(0, 8, 5, 5)).shape == (0, 8, 3, 3)


def test_low_precision_and_autocast() -> None:
    torch.manual_seed(0)
    layer = Involution2d(16, kernel_size=3).eval()
    x = torch.randn(2, 16, 8, 8)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = layer(x)
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    for out in (autocast, half):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item())


def test_autocast_trains_float32_parameters() -> None:
    layer = Involution2d(16, kernel_size=3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(torch.randn(2, 16, 8, 8)).float().square().mean()
    loss.backward()
    grads = [parameter.grad for parameter in layer.parameters()]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("stride", [1, 2])
def test_compiles_into_one_graph(stride: int) -> None:
    torch.manual_seed(0)
    layer = Involution2d(8, kernel_size=3, group_channels=4, stride=stride, pattern={(1, 1): 1, (2, 2): 1})
    x = torch.randn(2, 8, 7, 6, requires_grad=True)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), layer(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_channels": 32}, "group_channels must divide channels; got 32 and 16"),
        ({"group_channels": 5}, "group_channels must divide channels; got 5 and 16"),
        ({"group_channels": 0}, "group_channels must divide channels; got 0 and 16"),
        ({"kernel_size": 4}, "kernel sizes must be odd"),
        ({"stride": 0}, "stride must be an int or a pair of ints, at least 1; got 0"),
        ({"reduction": 17}, "reduction must be between 1 and channels, 16; got 17"),
        ({"kernel_generation": "mlp"}, "must be one of bottleneck, linear; got 'mlp'"),
        ({"dilation": 0}, "dilation must be an int or a pair of ints, at least 1; got 0"),
        ({"pattern": {(1, 1): 3}}, "counts must sum to 1 groups of 16 channels; got 3"),
        ({"pattern": {(1, 1): 1}, "dilation": 2}, "dilation and pattern exclude each other"),
        ({"backend": "magic"}, "involution2d has the backends .*; got 'magic'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Involution2d(16, **options)


@pytest.mark.parametrize("shape", [(16, 8, 8), (1, 8, 8, 8)])
def test_bad_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input must be \(N, 16, H, W\); got"):
        Involution2d(16)(torch.zeros(shape))


def test_initialisation_follows_the_published_training() -> None:
    torch.manual_seed(0)
    layer = Involution2d(256)
    weight = layer.get_parameter("conv2.conv.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / len(weight)), rel=0.05)
    assert not layer.get_parameter("conv2.conv.bias").any()
