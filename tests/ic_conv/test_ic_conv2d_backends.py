# SPDX-License-Identifier: Apache-2.0
"""The fast backends of the inception convolution against the reference in float64, and which of them runs."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ic_conv.functional import ic_conv2d
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.ops.backends import packed_ic_conv2d, split_ic_conv2d, triton_ic_conv2d
from ic_conv.ops.dispatch import BackendUnavailableError
from ic_conv.ops.ic_conv2d import IC_CONV2D, Branches, checked_call
from tests.tolerances import assert_near

LAST = torch.channels_last
SMALL: Branches = (((1, 1), 17), ((2, 1), 3), ((1, 4), 1), ((3, 2), 13), ((4, 4), 5))
STEPS: Branches = (((1, 1), 32), ((3, 2), 16))
CASES = [
    pytest.param(SMALL, (2, 16, 9, 11), 3, 1, id="small branches"),
    pytest.param(SMALL, (1, 32, 13, 7), 3, 2, id="stride 2"),
    pytest.param(SMALL, (3, 16, 5, 4), 3, (1, 3), id="window larger than the image"),
    pytest.param(SMALL, (1, 48, 8, 9), (3, 5), 1, id="3x5"),
    pytest.param(STEPS, (2, 16, 6, 7), 3, 1, id="steps of 16"),
    pytest.param((((2, 3), 7), ((1, 1), 4)), (1, 16, 1, 1), 3, 1, id="one pixel"),
]
CPU = [name for name in ("numba", "packed") if IC_CONV2D.available()[name] is None]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tensors(
    branches: Branches, shape: tuple[int, ...], kernel: int | tuple[int, int], layout: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    channels = sum(count for _, count in branches)
    weight = torch.randn(channels, shape[1], kh, kw, dtype=torch.float64) / (kh * kw * shape[1]) ** 0.5
    x, bias = torch.randn(shape, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    return x.to(memory_format=layout), weight.to(memory_format=layout), bias


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("branches", "shape", "kernel", "stride"), CASES)
@pytest.mark.parametrize("name", CPU)
def test_cpu_forward(
    name: str,
    branches: Branches,
    shape: tuple[int, ...],
    kernel: Any,
    stride: Any,
    biased: bool,
    layout: torch.memory_format,
) -> None:
    x, weight, bias = tensors(branches, shape, kernel, layout)
    arguments = x, weight, bias if biased else None
    expected = split_ic_conv2d.ic_conv2d(checked_call(*arguments, branches, stride, 1))
    single = (None if t is None else t.float() for t in arguments)
    call = checked_call(*single, branches, stride, 1, packs={})
    for _ in range(2):  # the second time with the weights that were kept
        y = IC_CONV2D.choose(call, name).run(call)
        assert_near(y, expected)
    assert y.is_contiguous(memory_format=layout)
    rectified = IC_CONV2D.choose(call, name).run(call._replace(relu=True))
    assert_near(rectified, expected.relu())
    assert (rectified == 0).any()


@pytest.mark.skipif("numba" not in CPU, reason="needs Numba")
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("branches", "shape", "kernel", "stride"),
    [*CASES, pytest.param(SMALL, (1, 112, 7, 6), 3, (2, 1), id="4 + 2 + 1 vectors of channels")],
)
def test_numba_gradients(
    branches: Branches, shape: tuple[int, ...], kernel: Any, stride: Any, layout: torch.memory_format
) -> None:
    source = tensors(branches, shape, kernel, layout)
    results = []
    for name, dtype in (("numba", torch.float32), ("split", torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in source]
        y = ic_conv2d(*leaves, branches, stride, backend=name)
        first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((grad**2).sum() for grad in first), leaves[:2])
        if y[0, 0].numel() > 1:  # else the two formats are one
            assert all(grad.is_contiguous(memory_format=layout) for grad in first[:2])
        results.append((y, *first, *second))
    for single, double in zip(*results, strict=True):
        scale = double.detach().abs().max()  # the table's tolerance is for size one
        assert_near(single.detach() / scale, double.detach() / scale)


@pytest.mark.skipif("numba" not in CPU, reason="needs Numba")
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
def test_numba_trains_in_a_compiled_graph(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = ICConv2d(16, 39, pattern=dict(SMALL), backend="numba").to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 16, 6, 7).contiguous(memory_format=layout).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (layer, compiled):
        run(x).square().sum().backward()
    gradients = [tensor.grad for tensor in (x, *layer.parameters())]  # both runs' sum
    layer.zero_grad()
    x.grad = None
    layer(x).square().sum().backward()
    for both, tensor in zip(gradients, (x, *layer.parameters()), strict=True):
        assert both is not None and tensor.grad is not None
        torch.testing.assert_close(both, 2 * tensor.grad)
        assert tensor.grad.stride() == tensor.stride()


@pytest.mark.parametrize("name", CPU)
def test_cpu_keeps_nan_in_its_window(name: str) -> None:
    x, weight, _ = (t.float() for t in tensors(SMALL, (1, 16, 11, 11), 3, LAST))
    x[0, 3, 0, 0] = float("nan")
    call = checked_call(x, weight, None, SMALL, 1, 1, True, packs={})
    y = IC_CONV2D.choose(call, name).run(call)
    assert y[..., 0, 0].isnan().all() and not y[..., 10, 10].isnan().any()
    torch.testing.assert_close(y.isnan(), split_ic_conv2d.ic_conv2d(call).isnan())


@pytest.mark.skipif("numba" not in CPU, reason="needs Numba")
def test_threads_share_the_work() -> None:
    """More threads than cores and many calls: each piece is computed once, by whoever comes first."""
    x, weight, _ = (t.float() for t in tensors(SMALL, (2, 32, 23, 19), 3, LAST))
    expected = ic_conv2d(x, weight, None, SMALL, backend="split")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for _ in range(20):
            torch.testing.assert_close(
                ic_conv2d(x, weight, None, SMALL, backend="numba"), expected, rtol=1e-5, atol=3e-5
            )
    finally:
        torch.set_num_threads(before)


def frozen() -> ICConv2d:
    torch.manual_seed(0)
    layer = ICConv2d(16, 39, pattern=dict(SMALL)).eval()
    layer.freeze()
    return layer


@pytest.mark.parametrize("name", CPU)
def test_frozen_layers_follow_changed_weights_and_shapes(name: str) -> None:
    layer = frozen()
    layer.backend = name
    for size, factor in ((9, 1.0), (9, 2.0), (6, 0.5)):
        layer.weight.mul_(factor)
        x = torch.randn(1, 16, size, size)
        expected = ic_conv2d(x, layer.weight, layer.bias, SMALL, backend="split")
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=3e-5)
    assert layer._packs


def test_frozen_layers_are_copied_and_pickled_without_what_they_keep() -> None:
    layer, x = frozen(), torch.randn(1, 16, 9, 9)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._packs == {} and twin._packs is not layer._packs
        torch.testing.assert_close(twin(x), expected)


def call(
    branches: Branches = SMALL,
    channels: int = 16,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    packs: dict[Any, Any] | None = None,
    groups: int = 1,
    size: int = 8,
    relu: bool = False,
) -> Any:
    out = sum(count for _, count in branches) * (1 if groups == 1 else channels // groups)
    weight = torch.zeros(out, channels // groups, 3, 3, dtype=dtype, requires_grad=grad)
    x = torch.zeros(1, channels, size, size, dtype=dtype)
    return checked_call(x, weight, None, branches, 1, groups, relu, packs)


@pytest.mark.skipif(INTERPRETED, reason="Triton stands first when it is interpreted")
@pytest.mark.parametrize(
    ("options", "numba", "chosen"),
    [
        ({}, None, "numba"),
        ({}, "no Numba", "split"),
        ({"packs": {}}, "no Numba", "packed"),
        ({"channels": 20}, None, "split"),
        ({"dtype": torch.float64}, None, "split"),
        ({"dtype": torch.bfloat16, "packs": {}}, None, "split"),
        ({"grad": True}, None, "numba"),
        ({"grad": True, "packs": {}}, "no Numba", "split"),
        ({"grad": True, "branches": (((2, 2), 64),)}, None, "split"),
        ({"grad": True, "branches": STEPS, "size": 512}, None, "numba"),
        ({"branches": (((1, 1), 4), ((2, 2), 4)), "groups": 8, "packs": {}}, None, "split"),
        ({"branches": (((2, 2), 64),)}, None, "split"),
        ({"branches": (((2, 2), 64),), "packs": {}}, None, "packed"),
        ({"branches": STEPS}, None, "numba"),  # small pieces: a call of oneDNN each would cost more
        ({"branches": STEPS, "size": 512}, None, "split"),
        ({"branches": STEPS, "size": 128}, None, "numba"),  # it would have to order the weights first
        ({"branches": STEPS, "size": 128, "packs": {}}, None, "packed"),
    ],
)
def test_choice(
    options: dict[str, Any], numba: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_ic_conv2d, "_kernel_missing", lambda: numba)
    monkeypatch.setattr(packed_ic_conv2d, "_onednn_missing", lambda: None)
    assert IC_CONV2D.choose(call(**options)).name == chosen


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("numba", {"grad": True, "relu": True}, "relu for inference only"),
        ("packed", {"grad": True, "packs": {}}, "no gradients"),
        ("numba", {"channels": 20}, "multiples of 16, got 20"),
        ("packed", {}, "ic_conv.fuse"),
        ("packed", {"dtype": torch.float64, "packs": {}}, "float64"),
        ("triton", {"dtype": torch.float64}, "float64|no GPU|cannot be imported"),
    ],
)
def test_reasons(name: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_ic_conv2d, "_kernel_missing", lambda: None)
    monkeypatch.setattr(packed_ic_conv2d, "_onednn_missing", lambda: None)
    with pytest.raises(BackendUnavailableError, match=reason):
        IC_CONV2D.choose(call(**options), name)


@pytest.mark.skipif("numba" not in CPU, reason="needs Numba")
def test_is_one_operation_for_a_compiler_and_plain_ones_for_who_watches() -> None:
    layer, x = frozen(), torch.randn(1, 16, 9, 9)
    expected = layer(x)
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=record)
    torch.testing.assert_close(compiled(x), expected)
    assert any("ic_conv2d" in name for name in seen)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 39 * 16 * 9 * 81
    traced = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(traced(2 * x), layer(2 * x), rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(torch.func.vmap(layer)(x[None]), expected[None], rtol=1e-5, atol=3e-5)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=3e-5)


# Triton: each test runs on a GPU, or in a child process that interprets the kernels on the CPU.

DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
triton_only = pytest.mark.skipif(
    triton_ic_conv2d.why_not(None) is not None,
    reason=f"triton: {triton_ic_conv2d.why_not(None)}; test_triton_in_the_interpreter runs this",
)


def test_triton_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("the tests below run here")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__)),
        "-k",
        "triton",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 14, done.stdout[-4000:]


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("stride", "kernel", "layout"),
    [(1, 3, LAST), (2, 3, torch.contiguous_format), ((1, 3), (3, 5), LAST)],
    ids=["plain", "stride 2", "3x5"],
)
def test_triton_forward_and_gradients(
    dtype: torch.dtype, stride: Any, kernel: Any, layout: torch.memory_format
) -> None:
    source = [t.to(DEVICE, dtype) for t in tensors(SMALL, (2, 24, 9, 7), kernel, layout)]
    ours = [t.clone().requires_grad_() for t in source]
    exact = [t.double().requires_grad_() for t in source]
    y = ic_conv2d(*ours, SMALL, stride, backend="triton")
    reference = ic_conv2d(*exact, SMALL, stride, backend="split")
    grad = torch.randn_like(y)
    y.backward(grad)
    reference.backward(grad.double())
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    assert_near(y.detach(), reference.detach())
    for tensor, twin in zip(ours, exact, strict=True):
        assert tensor.grad is not None and twin.grad is not None
        scale = twin.grad.abs().max()  # gradients sum over all pixels: the table's tolerance is for size one
        assert_near(tensor.grad / scale, twin.grad / scale)


@triton_only
def test_triton_second_derivatives() -> None:
    torch.manual_seed(0)
    branches = (((1, 1), 2), ((2, 1), 1))
    x, weight = torch.randn(1, 4, 5, 4, device=DEVICE), torch.randn(3, 4, 3, 3, device=DEVICE)
    results = []
    for backend, dtype in (("triton", torch.float32), ("split", torch.float64)):
        pair = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = ic_conv2d(*pair, None, branches, 2, backend=backend)
        first = torch.autograd.grad((y**3).sum(), pair, create_graph=True)
        results.append(torch.autograd.grad(sum((g**2).sum() for g in first), pair))
    for single, double in zip(*results, strict=True):
        assert_near(single / double.abs().max(), double / double.abs().max())


@triton_only
def test_triton_relu_bias_and_nan() -> None:
    x, weight, bias = (t.float().to(DEVICE) for t in tensors(SMALL, (1, 16, 11, 11), 3, LAST))
    x[0, 0, 0, 0] = float("nan")
    y, expected = (ic_conv2d(x, weight, bias, SMALL, backend=name, relu=True) for name in ("triton", "split"))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=3e-5, equal_nan=True)
    assert (y == 0).any()
    weight.requires_grad_()
    with pytest.raises(BackendUnavailableError, match="relu for inference only"):
        ic_conv2d(x, weight, bias, SMALL, backend="triton", relu=True)


@triton_only
def test_triton_compiles_to_one_graph() -> None:
    torch.manual_seed(0)
    layer, x = ICConv2d(16, 39, pattern=dict(SMALL)).to(DEVICE), torch.randn(1, 16, 6, 6, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = [*torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()]), layer(x)]
    got = [*torch.autograd.grad(compiled(x).square().sum(), [*layer.parameters()]), compiled(x)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@triton_only
@pytest.mark.parametrize("count", [1, 200])
def test_triton_tiles_cover_each_channel_once(count: int) -> None:
    branches = (((1, 1), 3 * count), ((2, 1), count))
    width = triton_ic_conv2d._tile_width(branches)
    rows = triton_ic_conv2d._tiles(branches, width, torch.device("cpu")).tolist()
    channels = [(c, dy, dx) for first, n, dy, dx in rows for c in range(first, first + n)]
    dilations = [d for d, n in branches for _ in range(n)]
    assert channels == [(c, *d) for c, d in enumerate(dilations)]
    assert all(n <= width for _, n, *_ in rows)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_triton_kernels_compile_for_gpus(dtype: str) -> None:
    """For compute capability 9.0, with the compiler that Triton brings along: no GPU is needed."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("interpreted kernels are not compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ic_conv.ops.backends import _triton_ic_conv2d as kernels

    constants = {"C": 64, "KH": 3, "KW": 3, "M": 128, "N": 64, "K": 32, "TILES": 5, "STEPS": 8}
    constants |= {"BIAS": True, "RELU": True, "PRECISION": "tf32", "WIDEN": False}
    pointers = {"x", "weight", "bias", "y", "grad", "grad_x"}
    for kernel in (kernels.forward, kernels.grad_input, kernels.grad_weight):
        known = {name: value for name, value in constants.items() if name in kernel.arg_names}
        types = dict.fromkeys(kernel.arg_names, "i32") | {"tiles": "*i32"} | dict.fromkeys(known, "constexpr")
        types |= dict.fromkeys(pointers & set(kernel.arg_names), f"*{dtype}")
        types |= {"grad_w": "*fp32"} if "grad_w" in kernel.arg_names else {}
        source = ASTSource(fn=kernel, signature=types, constexprs=known)
        assert "mma" in compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
