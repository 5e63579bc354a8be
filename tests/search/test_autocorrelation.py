# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from ic_conv.benchmark.measure import peak_memory
from search import DilationSpace
from search.autocorrelation import RIDGE, SecondMoments, SecondSums

# stride, groups, height and width, kernel, base kernel: borders matter more, the smaller the map is.
CASES: list[tuple[Any, int, tuple[int, int], int, int]] = [
    (1, 1, (13, 10), 9, 3),
    (1, 4, (6, 6), 9, 3),
    (2, 2, (13, 10), 9, 3),
    (2, 1, (1, 3), 9, 3),
    ((3, 1), 1, (7, 5), 5, 3),
    (1, 1, (4, 30), 13, 5),
    (2, 1, (12, 9), 13, 3),
]


def layer_of(stride: Any, groups: int, kernel: int, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, kernel, stride, kernel // 2, groups=groups, bias=bias).double()


def windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """All windows of all images as the layer reads them, (P, G, c, K * K)."""
    columns = unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)  # type: ignore[arg-type]
    return columns.transpose(1, 2).flatten(0, 1).unflatten(1, (layer.groups, 4 // layer.groups, -1))


def moments_of(layer: nn.Conv2d, batches: list[Tensor], space: DilationSpace, centred: bool) -> SecondMoments:
    sums = SecondSums(layer, space)
    outputs = []
    for x in batches:
        outputs.append(layer(x).detach())
        sums.add(x, outputs[-1])
    rows = torch.cat([y.movedim(1, 3).flatten(0, 2) for y in outputs])
    mean = torch.cat([windows(layer, x) for x in batches]).mean(0).reshape(4, *layer.kernel_size)
    if centred:
        return sums.result(mean, rows.mean(0), rows.var(0, correction=0), len(rows))
    return sums.result(0 * mean, 0 * rows.mean(0), rows.square().mean(0), len(rows))


@pytest.mark.parametrize(("stride", "groups", "size", "kernel", "base"), CASES)
def test_moments_equal_those_of_all_unfolded_windows(
    stride: Any, groups: int, size: tuple[int, int], kernel: int, base: int
) -> None:
    layer, space = layer_of(stride, groups, kernel), DilationSpace(kernel, base)
    batches = [torch.rand(3, 4, *size).double(), torch.rand(1, 4, size[0] + 1, size[1]).double()]
    moments = moments_of(layer, batches, space, centred=True)
    rows = torch.cat([windows(layer, x) for x in batches])
    outputs = torch.cat([layer(x).detach().movedim(1, 3).flatten(0, 2) for x in batches])
    for dilation, taps in zip(space.candidates, space.taps, strict=True):
        under = rows[..., taps].mT.flatten(2)
        under = under - under.mean(0)
        expected = torch.einsum("pga,pgb->gab", under, under) / len(rows)
        torch.testing.assert_close(moments.normal_matrix(dilation), expected, rtol=1e-9, atol=1e-13)
    cross = torch.einsum("pgo,pgct->goct", outputs.unflatten(1, (groups, -1)), rows).flatten(0, 1)
    torch.testing.assert_close(moments.cross, cross / len(rows), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("stride", "groups", "size"), [(1, 1, (7, 9)), (2, 2, (7, 9)), (1, 4, (3, 3))])
def test_the_fit_equals_a_dense_least_squares_solution(
    stride: int, groups: int, size: tuple[int, int], centred: bool
) -> None:
    layer, space = layer_of(stride, groups, 9, bias=centred), DilationSpace(9)
    x = torch.rand(40, 4, *size).double()
    moments = moments_of(layer, [x], space, centred)
    rows, outputs = windows(layer, x), layer(x).detach().movedim(1, 3).flatten(0, 2)
    for dilation, taps in list(zip(space.candidates, space.taps, strict=True))[::3]:
        fit = moments.fit(dilation, ridge=1e-13)
        for channel, output in enumerate(outputs.T):
            under = rows[:, channel // (8 // groups)][..., taps].flatten(1)
            if centred:
                under = torch.cat([under, torch.ones(len(under), 1).double()], 1)
            found = torch.cat([fit.taps[channel].flatten(), fit.offset[channel : channel + centred]])
            solution = torch.linalg.lstsq(under, output[:, None], driver="gelsd").solution[:, 0]
            left = (output - under @ solution).square().mean()
            torch.testing.assert_close(fit.error[channel], left, rtol=1e-6, atol=1e-10)
            torch.testing.assert_close(under @ found, under @ solution, rtol=1e-5, atol=1e-6)
            if torch.linalg.matrix_rank(under) == under.shape[1]:
                torch.testing.assert_close(found, solution, rtol=1e-4, atol=1e-5)


def test_some_units_get_what_all_would() -> None:
    for groups, units, channels in ((1, [1, 5], [1, 5]), (4, [1, 3], [2, 3, 6, 7])):
        moments = moments_of(
            layer_of(1, groups, 5), [torch.rand(9, 4, 8, 8).double()], DilationSpace(5), True
        )
        some, every = moments.fit((2, 1), torch.tensor(units)), moments.fit((2, 1))
        for part, whole in zip(some, every, strict=True):
            torch.testing.assert_close(part, whole[channels])


def test_what_the_data_leave_open_stays_as_it_was() -> None:
    """Dead inputs, constant images, fewer positions than weights: copied taps, and nothing is infinite."""
    layer, space = layer_of(1, 1, 5), DilationSpace(5)
    x = torch.rand(6, 4, 9, 9).double()
    x[:, 1] = 0
    moments = moments_of(layer, [x], space, centred=True)
    for dilation, taps in zip(space.candidates, space.taps, strict=True):
        fit = moments.fit(dilation, ridge=1e-6)
        copied = layer.weight.detach().flatten(2)[..., taps]
        torch.testing.assert_close(fit.taps[:, 1], copied[:, 1], rtol=1e-6, atol=1e-9)
        assert (fit.taps - copied).abs().amax() > 1e-2 and fit.error.isfinite().all()
    nothing = moments_of(layer, [torch.zeros(2, 4, 9, 9).double()], space, centred=True)
    fit = nothing.fit((2, 2))
    torch.testing.assert_close(fit.taps, layer.weight.detach()[:, :, ::2, ::2].flatten(2))
    assert fit.error.abs().max() < 1e-12
    few = moments_of(layer, [torch.rand(1, 4, 3, 3).double()], space, centred=True)
    assert few.positions < few.unknowns and few.fit((2, 2), ridge=RIDGE).taps.isfinite().all()


def test_single_precision_is_enough() -> None:
    layer, space = layer_of(1, 1, 9), DilationSpace(9)
    x = torch.rand(32, 4, 12, 12).double()
    exact = moments_of(layer, [x], space, centred=True)
    sums = SecondSums(layer.float(), space)
    sums.add(x.float(), layer(x.float()).detach())
    rough = sums.result(exact.mean.reshape(4, 9, 9), exact.output_mean, exact.variance, exact.positions)
    assert rough.inputs.dtype == torch.float32
    for dilation in ((1, 1), (3, 4)):
        torch.testing.assert_close(
            rough.fit(dilation).error.double(), exact.fit(dilation).error, rtol=2e-3, atol=1e-6
        )


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    layer, space = nn.Conv2d(16, 16, 9, padding=4), DilationSpace(9)

    def peak(batches: int) -> int:
        def add() -> None:
            sums = SecondSums(layer, space)
            for _ in range(batches):
                sums.add(torch.rand(16, 16, 32, 32), torch.rand(16, 16, 32, 32))  # 1 MiB each

        return peak_memory(add, torch.device("cpu")) or 0

    peak(2)
    assert peak(24) < peak(4) + 16 * 2**20


def test_rounding_that_breaks_definiteness_is_met_by_a_stronger_ridge() -> None:
    """Large means beside small variances, in single precision."""
    layer, space = layer_of(1, 1, 9, bias=True).float(), DilationSpace(9)
    x = 100 + 0.01 * torch.randn(8, 4, 12, 12)
    moments = moments_of(layer, [x], space, centred=True)
    fits = [moments.fit(dilation) for dilation in space.candidates]
    assert any(torch.linalg.cholesky_ex(moments.normal_matrix(d))[1].any() for d in space.candidates)
    assert all(fit.taps.isfinite().all() and fit.error.isfinite().all() for fit in fits)
    moments.inputs.fill_(float("nan"))
    with pytest.raises(ValueError, match="statistics must be finite"):
        moments.fit((1, 1))
