# SPDX-License-Identifier: Apache-2.0
"""Assignment under limits: against an integer program, its rules, its bound, and what users see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, milp
from torch import nn

from search import SearchTask, convert_to_supernet
from search.assign import assign_argmin, assign_within
from search.assignment import BranchLimits, UnitLimits, solve
from search.assignment.benchmark import rounded_total
from search.assignment.bounds import dual_ascent
from search.assignment.sets import SetTree
from search.assignment.transport import Transport
from search.space import DilationSpace
from search.strategies import EDOStrategy

Errors = NDArray[np.float64]


def random_errors(units: int, candidates: int, seed: int = 0) -> Errors:
    return np.random.default_rng([units, candidates, seed]).random((units, candidates))


def structured_errors(units: int, candidates: int, seed: int = 0) -> Errors:
    """As supernets give them: a few dilations suit most channels, and some channels are dead."""
    rng = np.random.default_rng([units, candidates, seed])
    errors = np.sort(rng.random(candidates)) * 0.3 + rng.random((units, candidates)) * 0.2
    errors[rng.random(units) < 0.1] = 0.0
    return errors


def integer_program(errors: Errors, limits: UnitLimits) -> float:
    """The least total, by HiGHS: x[u, d] units, open[d], multiples[d], extra[d] (who has the remainder)."""
    units, candidates = errors.shape
    columns = units * candidates + 3 * candidates
    x = np.arange(units * candidates).reshape(units, candidates)
    opened, multiples, extra = (units * candidates + i * candidates + np.arange(candidates) for i in range(3))
    rows, low, high = [], [], []

    def rule(parts: list[tuple[Any, float]], least: float, most: float) -> None:
        row = np.zeros(columns)
        for index, factor in parts:
            row[index] += factor
        rows.append(row)
        low.append(least)
        high.append(most)

    for unit in range(units):
        rule([(x[unit], 1)], 1, 1)
    for d in range(candidates):
        size = [(x[:, d], 1.0)]
        rule([*size, (multiples[d], -limits.multiple), (extra[d], -limits.remainder)], 0, 0)
        rule([*size, (opened[d], -limits.least)], 0, np.inf)
        rule([*size, (opened[d], -units)], -np.inf, 0)
    rule([(opened, 1)], 0, limits.most)
    rule([(extra, 1)], 0, 1)
    cost = np.concatenate([errors.ravel(), np.zeros(3 * candidates)])
    upper = np.concatenate([np.ones(x.size + candidates), np.full(candidates, units), np.ones(candidates)])
    result = milp(cost, constraints=LinearConstraint(rows, low, high), integrality=1, bounds=(0, upper))
    assert result.success
    return float(result.fun)


@pytest.mark.parametrize("make", [random_errors, structured_errors])
@pytest.mark.parametrize(
    ("units", "candidates", "multiple", "least", "most"),
    [
        (16, 6, 4, 1, 3),
        (16, 4, 4, 1, 16),  # more branches allowed than there are candidates
        (18, 5, 4, 1, 3),  # 2 over
        (15, 5, 4, 4, 2),  # 3 over, not enough for a branch of their own
        (20, 6, 2, 5, 4),  # the least branch is no multiple
        (20, 6, 1, 6, 20),
        (12, 6, 1, 1, 2),
        (10, 4, 8, 1, 8),  # 8 + 2, or 10
        (8, 4, 8, 1, 8),  # one branch
    ],
)
def test_totals_are_those_of_the_integer_program(
    make: Any, units: int, candidates: int, multiple: int, least: int, most: int
) -> None:
    for seed in range(3):
        errors, limits = make(units, candidates, seed), UnitLimits(units, multiple, least, most)
        found, exact = solve(errors, limits, tolerance=1e-6), integer_program(errors, limits)
        assert limits.allow(np.bincount(found.candidate))
        assert found.total == pytest.approx(errors[np.arange(units), found.candidate].sum())
        assert found.bound <= exact + 1e-6
        assert found.total >= exact - 1e-6
        # what the solver certifies must be true, and on problems of this size it finds the best
        assert found.total <= exact + max(1e-6, found.gap * exact) and found.gap < 0.05
        assert found.total == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("make", [random_errors, structured_errors])
@pytest.mark.parametrize(("units", "candidates"), [(64, 16), (128, 16), (64, 36)])
def test_layers_of_real_size_are_certified_and_better_than_rounding(
    make: Any, units: int, candidates: int
) -> None:
    errors, limits = make(units, candidates), BranchLimits(16, max_branches=8).of_layer(units, units)
    found = solve(errors, limits)
    assert limits.allow(np.bincount(found.candidate))
    assert found.gap <= 0.005
    assert found.total < rounded_total(errors, limits)


def test_sets_left_out_are_bounded() -> None:
    """Every set is either found, or its least possible total is above the goal."""
    from itertools import combinations

    errors, limits = random_errors(24, 8), UnitLimits(24, 4, 1, 3)
    bound = dual_ascent(errors.T, limits, 3, 5.0, errors.min(1), 50, np.inf)
    totals = {rows: errors[:, rows].min(1).sum() for rows in combinations(range(8), 3)}
    goal = float(np.median(list(totals.values())))
    result = SetTree(errors.T, bound, np.array([2, 5]), 3).search(goal, 1e9)
    assert result is not None
    least, sets = result
    found = {tuple(sorted(rows.tolist())) for _, rows in sets}
    assert goal <= least and 0 < len(found) < len(totals)
    for rows, total in totals.items():
        exact = solve(errors[:, rows], UnitLimits(24, 4, 1, 3), tolerance=1e-6)
        assert rows in found or exact.total >= goal * (1 - 1e-4), (rows, total)


def test_too_little_effort_gives_a_wider_but_true_gap() -> None:
    errors, limits = random_errors(64, 16), UnitLimits(64, 16, 1, 4)
    hasty, patient = solve(errors, limits, effort=1e3), solve(errors, limits)
    assert hasty.gap > patient.gap
    assert hasty.bound <= patient.total


def test_moving_units_keeps_the_assignment_best() -> None:
    """A chain over several branches is cheaper here than any direct move."""
    errors = np.array([[0.0, 1.0, 9.0], [9.0, 0.0, 1.0], [9.0, 9.0, 0.0]])
    start = Transport(errors)
    assert start.chain_costs()[2, 0] == 2.0
    moved = start.resize(np.array([2, 1, 0]))
    assert moved.branch.tolist() == [0, 0, 1] and moved.total == 2.0


def test_free_limits_are_plain_argmin() -> None:
    errors, space = random_errors(40, 16), DilationSpace(9)
    layer, solution = assign_within(errors, space.candidates, BranchLimits().of_layer(40, 40), "conv")
    assert layer == assign_argmin(errors, space, "conv") and solution.gap == 0


@pytest.mark.parametrize(
    ("units", "channels", "sizes"),
    [
        (64, 64, {16, 32, 48, 64}),
        (24, 24, {8, 16, 24}),  # one branch takes the remainder
        (8, 32, {4, 8}),  # groups of 4 channels
        (32, 1024, set(range(1, 33))),  # groups of 32 channels each fill the step
    ],
)
def test_the_multiple_counts_channels(units: int, channels: int, sizes: set[int]) -> None:
    assert set(BranchLimits(16).of_layer(units, channels).sizes.tolist()) == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_multiple": 0}, "channel multiple must be at least 1, got 0"),
        ({"max_branches": 0}, "max branches must be at least 1, got 0"),
        ({"channel_multiple": 65}, "conv1: the channel multiple must be at most its 64 channels, got 65"),
        ({"min_branch": 80}, "conv1: the min branch must be at most its 64 channels, got 80"),
    ],
)
def test_limits_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BranchLimits(**options).of_layer(64, 64, "conv1")


def small_task() -> SearchTask:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 32, 3, padding=1, groups=8)
    return SearchTask.of(convert_to_supernet(nn.Sequential(*layers), 9), [torch.randn(2, 3, 16, 16)])


def test_the_strategy_keeps_the_limits_and_tells_what_they_cost() -> None:
    task = small_task()
    plain, fast = (EDOStrategy(limits=limits).search(task) for limits in (None, BranchLimits(8, 16, 2)))
    assert [sorted(count for _, count in layer.branches) for layer in fast.layers] in (
        [[16, 24], [8]],
        [[16, 24], [4, 4]],
    )
    assert fast.meta["limits"] == {"channel_multiple": 8, "min_branch": 16, "max_branches": 2}
    assert set(fast.meta["layer_gap"]) == {"0", "2"}
    for name, error in plain.meta["layer_error"].items():
        assert error <= fast.meta["layer_error"][name]
    with pytest.raises(ValueError, match="2: the channel multiple must be at most its 32 channels, got 33"):
        EDOStrategy(limits=BranchLimits(33)).check(task)
