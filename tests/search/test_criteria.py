# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from search import DilationSpace, convert_to_supernet
from search._moments import ConvMoments
from search.assign import assign_argmin, unit_errors
from search.criteria import CRITERIA, criterion, needs_residuals
from search.planted import PlantedTask, planted_recovery
from search.statistics import collect
from search.supernet import super_layers

SPACE = DilationSpace(5)


def hand_made(weights: dict[tuple[int, int], float], mean: float = 1.0, square: float = 2.0) -> ConvMoments:
    """One channel with the given taps (row, column from the centre) over one input of constant moments."""
    weight = torch.zeros(1, 1, 5, 5)
    for (row, column), value in weights.items():
        weight[0, 0, 2 + row, 2 + column] = value
    grid = torch.ones(1, 5, 5, dtype=torch.float64)
    return ConvMoments(None, None, (1.0, 1.0), weight, grid * mean, grid * square)


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        # Candidates in order: (1, 1), (1, 2), (2, 1), (2, 2); each keeps the centre.
        ("energy", {(0, 0): 1, (0, 2): 3}, [0.9, 0.0, 0.9, 0.0]),
        ("taps", {(0, 0): 1, (0, 2): -3}, [0.75, 0.0, 0.75, 0.0]),
        ("taps", {(0, 2): 1, (0, -2): -1, (1, 0): 1}, [2 / 3, 0.0, 1.0, 1 / 3]),
        # Left and right cancel in the mean: the expectation does not see what (1, 1) loses.
        ("expectation", {(0, 2): 1, (0, -2): -1, (1, 0): 1}, [0.0, 0.0, 1 / 3, 1 / 3]),
    ],
)
def test_errors_of_a_hand_made_kernel(
    name: str, weights: dict[tuple[int, int], float], expected: list[float]
) -> None:
    errors = criterion(name)(hand_made(weights), SPACE)
    torch.testing.assert_close(errors, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("groups", [1, 2])
def test_criteria_equal_their_definitions(groups: int) -> None:
    torch.manual_seed(3)
    supernet = convert_to_supernet(nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=False).double(), 5)
    data = torch.rand(3, 4, 9, 9, dtype=torch.float64)
    layer = super_layers(supernet)[""]
    moments = collect(supernet, [data], SPACE, residuals=True)[""]
    windows = (
        torch.nn.functional.unfold(data, 5, padding=2).transpose(1, 2).flatten(0, 1).unflatten(1, (4, 25))
    )
    full = torch.zeros(6, 4, 25, dtype=torch.float64)  # dense weight of the grouped layer
    for channel in range(6):
        first = channel // (6 // groups) * (4 // groups)
        full[channel, first : first + 4 // groups] = layer.weight.detach()[channel].flatten(1)
    products = full * windows.mean(0)  # (6, 4, 25)
    energies = full.square() * windows.square().mean(0)
    outputs = torch.einsum("pit,cit->pc", windows, full)
    for index, mask in enumerate(SPACE.tap_masks().flatten(1)):
        kept = torch.einsum("pit,cit->pc", windows, full * mask)
        expected = {
            "energy": 1 - energies[..., mask].sum((1, 2)) / energies.sum((1, 2)),
            "expectation": (outputs.mean(0) - kept.mean(0)).abs() / products.sum(1).abs().sum(1),
            "taps": products.sum(1)[:, ~mask].abs().sum(1) / products.sum(1).abs().sum(1),
            "mse": (outputs - kept).var(0, correction=0) / outputs.var(0, correction=0),
        }
        for name, error in expected.items():
            found = criterion(name)(moments, SPACE)[:, index]
            torch.testing.assert_close(found, error, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_dead_channel_becomes_plain(name: str) -> None:
    supernet = convert_to_supernet(nn.Conv2d(2, 3, 3, padding=1, bias=False), 5)
    super_layers(supernet)[""].weight.data[1] = 0
    moments = collect(supernet, [torch.rand(2, 2, 9, 9)], SPACE, residuals=True, correlations=True)[""]
    errors = criterion(name)(moments, SPACE)
    assert torch.equal(errors[1], torch.zeros(4, dtype=torch.float64))
    assert assign_argmin(unit_errors(errors, 3), SPACE).assignment[1] == (1, 1)


def test_groups_share_the_mean_error_of_their_channels() -> None:
    errors = torch.tensor([[0.0, 1.0], [1.0, 0.5], [0.2, 0.1], [0.2, 0.1]], dtype=torch.float64)
    np.testing.assert_allclose(unit_errors(errors, 2), [[0.5, 0.75], [0.2, 0.1]])


def test_assignment_takes_the_first_of_equal_candidates_and_refuses_nan() -> None:
    errors = np.array([[0.5, 0.1, 0.1, 0.3], [0.2, 0.2, 0.2, 0.2]])
    assert assign_argmin(errors, SPACE, "a").assignment == ((1, 2), (1, 1))
    with pytest.raises(ValueError, match="a: errors must be finite"):
        assign_argmin(np.array([[np.nan, 1.0, 1.0, 1.0]]), SPACE, "a")


def test_unknown_criterion_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown criterion 'foo'; known ones: energy, expectation, taps, mse"
    ):
        criterion("foo")
    assert needs_residuals("mse") and not needs_residuals("energy")
    with pytest.raises(ValueError, match="residuals=True"):
        criterion("mse")(hand_made({(0, 0): 1}), SPACE)


@pytest.mark.slow
def test_planted_dilations_are_found() -> None:
    task = PlantedTask(kernel=5, in_channels=8, out_channels=16, size=16, batch_size=8)
    found, reached = planted_recovery(0, task)
    assert reached >= 0.99
    assert found["energy"] >= 0.95 > found["expectation"]
    assert found["refit"] == 1
