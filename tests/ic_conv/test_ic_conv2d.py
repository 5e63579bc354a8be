# SPDX-License-Identifier: Apache-2.0
"""ICConv2d against sums of shifted inputs, plain dilated convolutions and the published state layout."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ic_conv.functional import ic_conv2d
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.pattern import Dilation, LayerPattern

PATTERN = {(1, 1): 6, (2, 3): 0, (1, 4): 2, (3, 2): 4}
GROUPED = {(2, 1): 1, (1, 1): 2, (4, 4): 1}
GEOMETRIES = [
    pytest.param({}, PATTERN, (15, 14), id="plain"),
    pytest.param({"stride": 2}, PATTERN, (15, 14), id="stride 2"),
    pytest.param({"stride": (1, 3), "bias": False}, PATTERN, (7, 9), id="stride pair, no bias"),
    pytest.param({"kernel_size": 5}, PATTERN, (11, 13), id="5x5"),
    pytest.param({"kernel_size": (3, 5), "stride": 2}, PATTERN, (9, 9), id="3x5"),
    pytest.param({"groups": 4}, GROUPED, (8, 9), id="groups"),
    pytest.param({"groups": 8, "stride": 2}, {(1, 1): 3, (2, 2): 5}, (9, 8), id="depthwise, stride 2"),
    pytest.param({}, {(2, 3): 12}, (9, 8), id="one branch"),
    pytest.param({"groups": 4}, {(3, 1): 4}, (9, 8), id="one grouped branch"),
    pytest.param({}, PATTERN, (1, 2), id="smaller than the window"),
    pytest.param({"batch": 0}, PATTERN, (6, 5), id="empty batch"),
]


def build(options: Mapping[str, Any], pattern: Mapping[Dilation, int]) -> tuple[ICConv2d, Tensor]:
    torch.manual_seed(0)
    options = {"kernel_size": 3, **options}
    batch = options.pop("batch", 2)
    out_channels = 12 if options.get("groups", 1) != 8 else 16
    layer = ICConv2d(8, out_channels, dtype=torch.float64, pattern=pattern, **options)
    return layer, torch.empty(batch, 8, 1, 1, dtype=torch.float64)


def sum_of_taps(x: Tensor, layer: ICConv2d, pattern: Mapping[Dilation, int]) -> Tensor:
    """Output channel by output channel: shifted, strided inputs times one weight each."""
    groups, (kh, kw), (sy, sx) = layer.groups, layer.kernel_size, layer.stride
    columns, rows = x.shape[1] // groups, layer.out_channels // groups
    per_unit = 1 if groups == 1 else rows
    dilations = [d for d, count in pattern.items() for _ in range(count * per_unit)]
    height, width = x.shape[2:]
    outputs = []
    for c, (dy, dx) in enumerate(dilations):
        group = c // rows if groups > 1 else 0
        part = x[:, group * columns : (group + 1) * columns]
        py, px = dy * (kh // 2), dx * (kw // 2)
        padded = nn.functional.pad(part, (px, px, py, py))
        total = x.new_zeros(x.shape[0], height, width)
        for i in range(kh):
            for j in range(kw):
                window = padded[:, :, i * dy : i * dy + height, j * dx : j * dx + width]
                total = total + (window * layer.weight[c, :, i, j, None, None]).sum(1)
        outputs.append(total[:, ::sy, ::sx] + (0 if layer.bias is None else layer.bias[c]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(("options", "pattern", "size"), GEOMETRIES)
def test_output_is_a_sum_of_taps(
    options: dict[str, Any], pattern: dict[Dilation, int], size: tuple[int, int]
) -> None:
    """Of the reference; test_ic_conv2d_backends.py compares the other backends with it."""
    layer, x = build({**options, "backend": "split"}, pattern)
    x = torch.randn(*x.shape[:2], *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), sum_of_taps(x, layer, pattern), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_each_branch_is_a_plain_dilated_convolution(stride: int) -> None:
    layer, x = build({"stride": stride}, PATTERN)
    x, start = torch.randn(2, 8, 13, 12, dtype=torch.float64), 0
    y = layer(x)
    for dilation, count in layer.pattern.branches:
        conv = nn.Conv2d(8, count, 3, stride, dilation, dilation, dtype=torch.float64)
        rows = slice(start, start + count)
        conv.load_state_dict({"weight": layer.weight[rows], "bias": layer.bias[rows]})
        torch.testing.assert_close(y[:, rows], conv(x), rtol=1e-12, atol=1e-12)
        start += count
    assert start == 12


@pytest.mark.parametrize(("groups", "pattern"), [(1, {(1, 1): 1, (2, 1): 2}), (3, {(1, 2): 1, (2, 1): 2})])
def test_gradients(groups: int, pattern: dict[Dilation, int]) -> None:
    torch.manual_seed(0)
    shapes = (1, 3, 5, 4), (3, 3 // groups, 3, 3), (3,)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda x, w, b: ic_conv2d(x, w, b, tuple(pattern.items()), 2, groups), tensors
    )


@pytest.mark.parametrize(
    ("groups", "pattern"),
    [(1, PATTERN), (4, GROUPED), (1, {(2, 2): 12})],
    ids=["plain", "groups", "one branch"],
)
def test_costs_what_a_plain_convolution_costs(groups: int, pattern: dict[Dilation, int]) -> None:
    layer = ICConv2d(8, 12, 3, 2, groups=groups, pattern=pattern)
    plain = nn.Conv2d(8, 12, 3, 2, 1, groups=groups)
    flops = []
    for module in (layer, plain):
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(2, 8, 9, 10))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in plain.parameters())


def test_one_branch_is_one_convolution_and_nothing_else() -> None:
    layer, x = ICConv2d(8, 12, pattern={(2, 3): 12}), torch.randn(1, 8, 9, 9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    names = [event.key for event in profile.key_averages()]
    assert "aten::conv2d" in names
    assert not {"aten::cat", "aten::split", "aten::slice", "aten::narrow"} & set(names)


def test_takes_nn_conv2d_arguments_and_attributes() -> None:
    layer = ICConv2d(8, 12, 5, 2, 2, 1, 4, False, "zeros", None, torch.float16, pattern=GROUPED)
    plain = nn.Conv2d(8, 12, 5, 2, 2, 1, 4, False, "zeros", None, torch.float16)
    names = "in_channels out_channels kernel_size stride padding dilation groups transposed output_padding"
    for name in (*names.split(), "padding_mode", "bias"):
        assert getattr(layer, name) == getattr(plain, name)
    assert layer.weight.shape == plain.weight.shape and layer.weight.dtype == torch.float16
    assert ICConv2d(8, 12, 3, pattern=LayerPattern.from_counts(PATTERN)).padding == (1, 1)
    assert "(1, 4): 2" in repr(ICConv2d(8, 12, 3, pattern=PATTERN))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "odd"),
        ({"padding": 0}, "padding must be 'same'"),
        ({"padding": "valid"}, "padding must be 'same'"),
        ({"padding": (1, 2)}, "padding must be 'same'"),
        ({"dilation": 2}, "dilation must be 1"),
        ({"padding_mode": "reflect"}, "padding_mode"),
        ({"groups": 5}, "groups must divide"),
        ({"groups": 0}, "groups must divide"),
        ({"groups": 4}, "sum to 4 groups; got 12"),
        ({"stride": 0}, "stride"),
        ({"pattern": {(1, 1): 11}}, "sum to 12 output channels; got 11"),
        ({"pattern": LayerPattern.plain(3, "layer1.0.conv2")}, "layer1.0.conv2: counts must sum to 12"),
        ({"pattern": {(0, 1): 12}}, "positive"),
        ({"backend": "fast"}, "split"),
    ],
)
def test_refuses_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ICConv2d(**{"in_channels": 8, "out_channels": 12, "pattern": PATTERN, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 5, 5)}, "needs x"),
        ({"x": torch.zeros(1, 7, 5, 5)}, "must have 8 channels"),
        ({"x": torch.zeros(1, 8, 5, 5, dtype=torch.float64)}, "dtype"),
        ({"x": torch.zeros(1, 8, 5, 5, device="meta")}, "device"),
        ({"weight": torch.zeros(12, 8, 2, 2)}, "odd"),
        ({"bias": torch.zeros(11)}, "bias must"),
        ({"groups": 5}, "groups must divide"),
        ({"branches": [((1, 1), 11)]}, "sum to 12 output channels; got 11"),
        ({"branches": [((1, 1), 13), ((1, 2), -1)]}, "positive"),
        ({"branches": [((0, 1), 12)]}, "positive"),
    ],
)
def test_refuses_wrong_tensors(change: dict[str, Any], message: str) -> None:
    call = {"x": torch.zeros(1, 8, 5, 5), "weight": torch.zeros(12, 8, 3, 3), "bias": torch.zeros(12)}
    with pytest.raises(ValueError, match=message):
        ic_conv2d(**{**call, "branches": [((1, 1), 12)], **change})


def published_state(layer: ICConv2d) -> dict[str, Tensor]:
    """The layout in which every branch was a convolution of its own."""
    state, start = {}, 0
    per_unit = layer.out_channels // layer.pattern.units
    for index, (_, count) in enumerate(layer.pattern.branches):
        rows = slice(start, start + count * per_unit)
        state[f"conv_list.{index}.weight"] = layer.weight[rows].detach().clone()
        if layer.bias is not None:
            state[f"conv_list.{index}.bias"] = layer.bias[rows].detach().clone()
        start = rows.stop
    return state


@pytest.mark.parametrize(("groups", "pattern"), [(1, PATTERN), (4, GROUPED)])
@pytest.mark.parametrize("kind", ["own", "published", "plain"])
@pytest.mark.parametrize("bias", [True, False])
def test_loads_states(kind: str, groups: int, pattern: dict[Dilation, int], bias: bool) -> None:
    source, target = (ICConv2d(8, 12, groups=groups, bias=bias, pattern=pattern) for _ in range(2))
    state = source.state_dict() if kind == "own" else published_state(source)
    if kind == "plain":
        state = {key: value for key, value in source.state_dict().items() if key != "branches"}
    model = nn.ModuleDict({"conv": target})
    model.load_state_dict({f"conv.{key}": value for key, value in state.items()})
    assert target.branches.tolist() == [[*d, n] for d, n in pattern.items() if n]
    x = torch.randn(1, 8, 7, 7)
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ICConv2d(8, 12, pattern={(1, 1): 6, (1, 4): 6}).state_dict(), r"conv.branches: .*1, 4, 2.*1, 4, 6"),
        (
            published_state(ICConv2d(8, 12, pattern={(1, 1): 5, (1, 4): 7})),
            r"conv_list: .*\(2, 8, 3, 3\).*got \[\(5, 8, 3, 3\), \(7, 8, 3, 3\)\]",
        ),
        ({"output_order": torch.zeros(12, dtype=torch.int64)}, "output_order: must hold each of 12 channels"),
        ({"weight": torch.zeros(12, 8, 5, 5), "bias": torch.zeros(12)}, "size mismatch for conv.weight"),
        ({"weight": torch.zeros(12, 8, 3, 3)}, "Missing.*conv.bias"),
    ],
    ids=["own", "published", "order", "shape", "missing"],
)
def test_refuses_states_of_other_layers(other: dict[str, Tensor], message: str) -> None:
    model = nn.ModuleDict({"conv": ICConv2d(8, 12, pattern=PATTERN)})
    with pytest.raises(RuntimeError, match=message) as caught:
        model.load_state_dict({f"conv.{key}": value for key, value in other.items()})
    assert len(str(caught.value).splitlines()) == 2


def test_output_order_travels_with_the_state() -> None:
    source, target = (ICConv2d(8, 12, pattern=PATTERN) for _ in range(2))
    source.output_order = torch.randperm(12)
    x = torch.randn(2, 8, 7, 7)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)
    source.output_order = None
    target.load_state_dict(source.state_dict())
    assert target.output_order is None
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_orders_and_memory_format(last: bool) -> None:
    layer, x = ICConv2d(8, 12, groups=4, pattern=GROUPED), torch.randn(2, 8, 7, 6)
    expected = layer(x)
    inputs, outputs = torch.randperm(8), torch.randperm(12)
    layer.input_order, layer.output_order = inputs.argsort(), outputs
    if last:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    y = layer(x[:, inputs].to(memory_format=torch.channels_last if last else torch.contiguous_format))
    torch.testing.assert_close(y, expected[:, outputs])
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_survives_copies_casts_and_pickling() -> None:
    layer, x = ICConv2d(8, 12, pattern=PATTERN), torch.randn(1, 8, 7, 7)
    layer.output_order = torch.randperm(12)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    half = copy.deepcopy(layer).half()
    assert half.branches.dtype == half.output_order.dtype == torch.int64
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == (1, 12, 7, 7)


def test_runs_under_autocast() -> None:
    layer, x = ICConv2d(8, 12, pattern=PATTERN), torch.randn(1, 8, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_to_one_graph(autocast: bool) -> None:
    layer, x = ICConv2d(8, 12, pattern=PATTERN), torch.randn(1, 8, 7, 7)
    layer.output_order = torch.randperm(12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(compiled(x), layer(x))


def test_is_traced_by_fx() -> None:
    layer, x = ICConv2d(8, 12, pattern=PATTERN), torch.randn(1, 8, 7, 7)
    layer.output_order = torch.randperm(12)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), layer(x), rtol=0, atol=0)


def test_a_nan_stays_where_its_window_is() -> None:
    layer, x = ICConv2d(8, 12, pattern=PATTERN), torch.zeros(1, 8, 9, 9)
    x[0, 0, 0, 0] = float("nan")
    y = layer(x)
    assert y[..., 0, 0].isnan().all() and not y[..., 8, 8].isnan().any()
