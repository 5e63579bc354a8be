# SPDX-License-Identifier: Apache-2.0
"""The involution operator: every backend that runs here against a float64 sum over taps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ic_conv.functional import involution2d
from ic_conv.ops.involution2d import INVOLUTION2D
from tests.tolerances import assert_near

AVAILABLE = INVOLUTION2D.available()
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name, reason in AVAILABLE.items()
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """batch, channels, groups, (H, W), kernel, and the options of involution2d."""

    batch: int
    channels: int
    groups: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)


def per_group(*pairs: tuple[int, int]) -> dict[str, Any]:
    return {"dilation": pairs}


CASES = [
    pytest.param(Case(2, 32, 2, (6, 9), (7, 7)), id="K7"),
    pytest.param(Case(1, 24, 3, (5, 7), (3, 3), {"stride": 2}), id="K3, odd size, stride 2"),
    pytest.param(Case(2, 16, 2, (7, 5), (7, 7), {"stride": 2}), id="K7, odd size, stride 2"),
    pytest.param(Case(1, 16, 1, (9, 8), (5, 5), {"stride": (3, 1)}), id="G1, K5, stride pair"),
    pytest.param(Case(1, 6, 6, (7, 7), (3, 5)), id="G=C, 3x5"),
    pytest.param(Case(1, 10, 2, (6, 7), (9, 9)), id="K9, 5 channels per group"),
    pytest.param(Case(1, 24, 1, (4, 5), (3, 3)), id="24 channels per group"),
    pytest.param(Case(1, 64, 2, (5, 4), (3, 3), {"stride": 2}), id="32 channels per group, stride 2"),
    pytest.param(Case(2, 8, 2, (8, 9), (3, 3), {"dilation": (2, 3)}), id="dilation"),
    pytest.param(Case(2, 32, 4, (9, 8), (3, 3), per_group((1, 1), (2, 1), (2, 1), (1, 4))), id="per group"),
    pytest.param(
        Case(1, 48, 3, (9, 7), (5, 3), {"stride": 2, **per_group((3, 1), (1, 2), (2, 2))}),
        id="per group, stride 2",
    ),
    pytest.param(Case(1, 8, 2, (13, 4), (3, 3), {"stride": (4, 1), "dilation": (2, 1)}), id="gcd of 4 and 2"),
    pytest.param(Case(2, 8, 2, (6, 6), (3, 3), {"padding": 0}), id="no padding"),
    pytest.param(Case(1, 8, 1, (4, 5), (3, 3), {"padding": (3, 2), "stride": 2}), id="wide padding"),
    pytest.param(Case(1, 4, 1, (1, 1), (7, 7)), id="one pixel"),
    pytest.param(Case(1, 4, 1, (2, 3), (3, 3), {"dilation": 5}), id="only the centre inside"),
]


def direct_sum(
    x: Tensor, weight: Tensor, grad: Tensor, stride: Any = 1, padding: Any = None, dilation: Any = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients by x and weight, by the definition: one output and one tap at a time."""
    (_, channels, height, width), (groups, *kernel) = x.shape, weight.shape[1:4]
    stride = (stride, stride) if isinstance(stride, int) else stride
    pair: Any = (dilation, dilation) if isinstance(dilation, int) else dilation
    y, grad_x, grad_weight = (torch.zeros_like(t) for t in (grad, x, weight))
    for g in range(groups):
        dy, dx = pair if isinstance(pair[0], int) else pair[g]
        py, px = dy * (kernel[0] - 1) // 2, dx * (kernel[1] - 1) // 2
        if padding is not None:
            py, px = (padding, padding) if isinstance(padding, int) else padding
        c = slice(g * channels // groups, (g + 1) * channels // groups)
        for i, j, u, v in product(*(range(n) for n in (*y.shape[2:], *kernel))):
            row, column = i * stride[0] + u * dy - py, j * stride[1] + v * dx - px
            if 0 <= row < height and 0 <= column < width:
                y[:, c, i, j] += weight[:, g, u, v, i, j, None] * x[:, c, row, column]
                grad_x[:, c, row, column] += weight[:, g, u, v, i, j, None] * grad[:, c, i, j]
                grad_weight[:, g, u, v, i, j] = (grad[:, c, i, j] * x[:, c, row, column]).sum(1)
    return y, grad_x, grad_weight


def out_size(case: Case) -> tuple[int, int]:
    stride = case.options.get("stride", 1)
    stride = (stride, stride) if isinstance(stride, int) else stride
    padding = case.options.get("padding")
    if padding is None:
        return math.ceil(case.size[0] / stride[0]), math.ceil(case.size[1] / stride[1])
    padding = (padding, padding) if isinstance(padding, int) else padding
    rows, columns = (
        (n + 2 * p - k) // s + 1 for n, p, k, s in zip(case.size, padding, case.kernel, stride, strict=True)
    )
    return rows, columns


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient by y in float64, with values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(len(str(case)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().double()

    x = draw(case.batch, case.channels, *case.size)
    weight = draw(case.batch, case.groups, *case.kernel, *out_size(case))
    return x, weight, draw(case.batch, case.channels, *out_size(case))


def computed(case: Case, backend: str | None, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The same by a backend, on its device."""
    if backend is not None and backend.startswith("cupy"):
        x, weight, grad = x.cuda(), weight.cuda(), grad.cuda()
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = involution2d(x, weight, backend=backend, **case.options)
    return tuple(t.cpu() for t in (y.detach(), *torch.autograd.grad(y, (x, weight), grad)))


def can(backend: str, dtype: torch.dtype, case: Case) -> bool:
    """Whether the backend claims to take the dtype and the channels per group."""
    if backend == "numba":
        return dtype == torch.float32 and case.channels // case.groups % 4 == 0
    return not backend.startswith("cupy") or dtype != torch.float64


@pytest.fixture(scope="module", params=CASES)
def solved(request: pytest.FixtureRequest) -> tuple[Case, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A case with its tensors and the direct sums, which are slow."""
    inputs = tensors(request.param)
    return request.param, inputs, direct_sum(*inputs, **request.param.options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(
    backend: str, solved: tuple[Case, tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
) -> None:
    case, inputs, references = solved
    for dtype in DTYPES:
        if can(backend, dtype, case):
            for actual, reference in zip(
                computed(case, backend, *(t.to(dtype) for t in inputs)), references, strict=True
            ):
                assert actual.dtype == dtype
                assert_near(actual, reference)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["strided", "channels last", "expanded"])
def test_layouts(backend: str, layout: str) -> None:
    """Inputs, weights and gradients that are not contiguous; channels last goes in and comes out."""
    case = Case(2, 16, 2, (7, 6), (3, 3), {"stride": (2, 1)})
    x, weight, grad = (t.float() for t in tensors(case))
    if layout == "strided":
        x, grad = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, grad))
        weight = weight.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    elif layout == "channels last":
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    else:
        grad = grad[:1, :1, :1, :1].expand_as(grad)
    assert not (grad.is_contiguous() and x.is_contiguous())
    results = computed(case, backend, x, weight, grad)
    references = direct_sum(x.double(), weight.double(), grad.double(), **case.options)
    for actual, reference in zip(results, references, strict=True):
        assert_near(actual, reference)
    if layout == "channels last" and backend != "reference":
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in results[:2])


@pytest.mark.parametrize("backend", ["reference", "shift"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, per_group((1, 1), (2, 1))])
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    x, weight, _ = tensors(Case(1, 4, 2, (3, 4), (3, 3), options))
    inputs = (x.requires_grad_(), weight.requires_grad_())

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return involution2d(x, weight, backend=backend, **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend: str) -> None:
    case = Case(1, 4, 1, (5, 5), (3, 3))
    x, weight, grad = (t.float() for t in tensors(case))
    device = "cuda" if backend.startswith("cupy") else "cpu"
    x, weight, grad = x.to(device), weight.to(device), grad.to(device)
    for wanted, other in ((x, weight), (weight, x)):
        wanted.requires_grad_(), other.requires_grad_(False)
        involution2d(x, weight, backend=backend).backward(grad)
        assert wanted.grad is not None and other.grad is None
        wanted.grad = None


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    device = "cuda" if backend.startswith("cupy") else "cpu"
    x = torch.zeros(0, 8, 5, 5, device=device, requires_grad=True)
    weight = torch.zeros(0, 2, 3, 3, 3, 3, device=device, requires_grad=True)
    y = involution2d(x, weight, 2, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 8, 3, 3) and x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_what_reads_it_and_nothing_else(backend: str, value: float) -> None:
    device = "cuda" if backend.startswith("cupy") else "cpu"
    x, weight = torch.ones(1, 8, 6, 6, device=device), torch.ones(1, 2, 3, 3, 6, 6, device=device)
    x[0, 5, 4, 4] = value
    weight[0, 0, 0, 0, 0, 0] = value  # a tap in the padding
    y = involution2d(x, weight, backend=backend).cpu()
    reads_it = torch.zeros(1, 8, 6, 6, dtype=torch.bool)
    reads_it[0, 5, 3:, 3:] = True
    assert torch.equal(~y.isfinite(), reads_it)


WRONG = [
    pytest.param((1, 4, 5), (1, 1, 3, 3, 5, 5), {}, r"x \(N, C, H, W\).*\(1, 4, 5\)", id="rank of x"),
    pytest.param((1, 4, 5, 5), (1, 1, 9, 5, 5), {}, r"weight \(N, G.*\(1, 1, 9, 5, 5\)", id="rank of weight"),
    pytest.param((2, 4, 5, 5), (1, 1, 3, 3, 5, 5), {}, "same batch size; got 2 and 1", id="batch"),
    pytest.param((1, 4, 5, 5), (1, 3, 3, 3, 5, 5), {}, "divide the channels; got 3 and 4", id="groups"),
    pytest.param((1, 4, 5, 5), (1, 0, 3, 3, 5, 5), {}, "divide the channels; got 0 and 4", id="no group"),
    pytest.param((1, 4, 5, 5), (1, 1, 3, 4, 5, 5), {}, r"odd; got \(3, 4\)", id="even kernel"),
    pytest.param(
        (1, 4, 5, 7), (1, 1, 3, 3, 2, 3), {"stride": 2}, r"must be \(3, 4\).*got \(2, 3\)", id="output size"
    ),
    pytest.param((1, 4, 2, 2), (1, 1, 3, 3, 0, 0), {"padding": 0}, r"\(0, 0\)", id="no output"),
    pytest.param((1, 4, 5, 5), (1, 1, 3, 3, 5, 5), {"dilation": 0}, "at least 1; got 0", id="dilation 0"),
    pytest.param(
        (1, 4, 5, 5),
        (1, 2, 3, 3, 5, 5),
        {"dilation": [(1, 1), (1, 0)]},
        r"got \(1, 0\)",
        id="group's dilation 0",
    ),
    pytest.param(
        (1, 4, 5, 5), (1, 2, 3, 3, 5, 5), {"dilation": [(1, 1)] * 3}, "2 groups; got 3 pairs", id="pairs"
    ),
    pytest.param(
        (1, 4, 5, 5),
        (1, 2, 3, 3, 5, 5),
        {"padding": 1, "dilation": [(1, 1), (2, 1)]},
        r"must be \(3, 5\).*dilation \(2, 1\)",
        id="padding of one group",
    ),
    pytest.param((1, 4, 5, 5), (1, 1, 3, 3, 5, 5), {"stride": 0}, "stride.*got 0", id="stride 0"),
    pytest.param((1, 4, 5, 5), (1, 1, 3, 3, 5, 5), {"padding": -1}, "padding.*got -1", id="padding -1"),
    pytest.param(
        (1, 4, 5, 5), (1, 1, 3, 3, 5, 5), {"backend": "cudnn"}, "cupy, numba, shift.*'cudnn'", id="backend"
    ),
]


@pytest.mark.parametrize(("x_shape", "weight_shape", "options", "message"), WRONG)
def test_wrong_arguments(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as info:
        involution2d(torch.zeros(x_shape), torch.zeros(weight_shape), **options)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dtype": torch.float64}, "same dtype; got x torch.float32, weight torch.float64"),
        ({"device": "meta"}, "same device; got x cpu, weight meta"),
    ],
)
def test_mixed_tensors(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        involution2d(torch.zeros(1, 4, 5, 5), torch.zeros(1, 1, 3, 3, 5, 5, **other))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        involution2d(torch.zeros(1, 4, 5, 5).int(), torch.zeros(1, 1, 3, 3, 5, 5).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast the operator computes in its dtype, whatever mixture comes in; float64 stays."""
    case = Case(1, 8, 2, (5, 6), (3, 3))
    x, weight, grad = tensors(case)
    reference, *_ = direct_sum(x, weight, grad)
    leaf = weight.float().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = involution2d(x.float(), leaf)
        assert y.dtype == dtype
        assert_near(y.detach(), reference)
        assert involution2d(x, weight).dtype == torch.float64
    y.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
