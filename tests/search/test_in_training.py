# SPDX-License-Identifier: Apache-2.0
"""What shrinks and what follows, piece by piece; tests/openmmlab/test_search_hook.py trains with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from search import DilationSpace, SearchTask, convert_to_supernet, narrow
from search.assign import best_candidates
from search.in_training import follow, kept_counts, shrink, tap_mask
from search.strategies import EDOStrategy
from search.supernet import open_candidates


@pytest.mark.parametrize(
    ("candidates", "searches", "counts"),
    [(16, 1, [1]), (16, 2, [4, 1]), (16, 4, [8, 4, 2, 1]), (36, 3, [11, 4, 1]), (4, 3, [3, 2, 1])],
)
def test_how_many_candidates_are_kept(candidates: int, searches: int, counts: list[int]) -> None:
    assert kept_counts(candidates, searches) == counts


def test_the_best_candidates_and_of_equal_ones_the_first() -> None:
    errors = np.array([[0.3, 0.1, 0.2, 0.4], [0.5, 0.5, 0.5, 0.5]])
    assert best_candidates(errors, 2).tolist() == [[False, True, True, False], [True, True, False, False]]
    with pytest.raises(ValueError, match="x: errors must be finite"):
        best_candidates(errors * np.nan, 1, "x")


def test_a_unit_takes_none_but_the_candidates_that_it_has_left() -> None:
    supernet = convert_to_supernet(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), 5)
    with torch.no_grad():
        weight = supernet[0].weight.fill_(0.1)
        weight[:, :, 2, ::2], weight[:, :, ::2, 2] = 5, 5  # of (2, 2) the corners alone are small
    task = SearchTask.of(supernet, [torch.randn(2, 3, 16, 16)])
    kept = np.array(
        [[False, True, True, False]] * 8
    )  # (1, 2) and (2, 1), which have the axes in common with it
    assert set(EDOStrategy().search(task).layers[0].assignment or ()) == {(2, 2)}
    shrink(supernet, {"0": kept}, [])
    assert open_candidates(supernet[0]).tolist() == kept.tolist()
    assert set(EDOStrategy().search(task).layers[0].assignment or ()) <= {(1, 2), (2, 1)}
    assert not (EDOStrategy().narrowed(task, 2)["0"] & ~kept).any()


def test_a_loop_of_ones_own_narrows_a_supernet() -> None:
    torch.manual_seed(0)
    supernet = convert_to_supernet(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), 9)
    batches = [torch.randn(2, 3, 16, 16)]
    optimizer = torch.optim.AdamW(supernet.parameters())
    for step in range(4):
        if step == 2:
            best = EDOStrategy().narrowed(SearchTask.of(supernet, batches), 4)["0"]
            narrow(supernet, batches, 4, [optimizer])
        supernet(batches[0]).square().mean().backward()
        optimizer.step()
    assert open_candidates(supernet[0]).tolist() == best.tolist() and (best.sum(1) == 4).all()


def test_the_taps_of_kept_candidates() -> None:
    space = DilationSpace(5)  # dilations (1, 1), (1, 2), (2, 1), (2, 2)
    kept = torch.tensor([[True, False, False, True], [False, True, False, False]])
    mask = tap_mask(space, kept, 4)[:, 0]
    assert mask.shape == (4, 5, 5) and torch.equal(mask[0], mask[1]) and torch.equal(mask[2], mask[3])
    both = [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 1, 0, 1]]
    wide = [[0] * 5, [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [0] * 5]
    assert mask[0].int().tolist() == both and mask[2].int().tolist() == wide


def test_state_that_does_not_go_by_elements_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    old, new = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 3))
    other = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [old], "lr": 0.1}, {"params": [other], "lr": 0.2}])
    optimizer.state[old] = {"step": torch.tensor(3.0), "rows": torch.zeros(4, 1)}
    follow(optimizer, {"w": old}, {"w": new}, {"w": torch.arange(6).view(2, 3)})
    assert new not in optimizer.state and "w: the optimizer's state does not go by elements" in caplog.text
    assert optimizer.param_groups[0]["params"] == [new] and optimizer.param_groups[1]["params"] == [other]
