# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from search import DilationSpace


@pytest.mark.parametrize(("kernel", "base", "candidates"), [(9, 3, 16), (13, 3, 36), (9, 5, 4), (13, 7, 4)])
def test_number_of_candidates(kernel: int, base: int, candidates: int) -> None:
    space = DilationSpace(kernel, base)
    assert len(space.candidates) == candidates == len(set(space.candidates))
    assert space.candidates[0] == (1, 1) and space.candidates[1] == (1, 2)


@pytest.mark.parametrize(("kernel", "base"), [(9, 3), (13, 5)])
def test_masks_are_where_a_dilated_convolution_reads(kernel: int, base: int) -> None:
    space = DilationSpace(kernel, base)
    impulse = torch.zeros(1, 1, kernel, kernel)
    impulse[0, 0, kernel // 2, kernel // 2] = 1
    for mask, (dy, dx) in zip(space.tap_masks(), space.candidates, strict=True):
        padding = (dy * (base // 2), dx * (base // 2))
        seen = conv2d(impulse, torch.ones(1, 1, base, base), padding=padding, dilation=(dy, dx))
        assert torch.equal(mask, seen[0, 0] > 0)


@pytest.mark.parametrize(
    ("kernel", "base", "rule"),
    [
        (8, 3, "odd number of at least 3, got 8"),
        (1, 3, "odd number of at least 3, got 1"),
        (3, 3, "must be larger than the base kernel, got kernel 3 for base kernel 3"),
        (5, 5, "must be larger than the base kernel"),
        (11, 5, "d \\* \\(base kernel - 1\\) \\+ 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kernel: int, base: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        DilationSpace(kernel, base)
