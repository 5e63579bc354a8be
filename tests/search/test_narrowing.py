# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from search import SearchTask, convert_to_supernet
from search.data import ScatteredDigits
from search.engine import TrainOptions, train
from search.narrowing import NarrowHook
from search.strategies import EDOStrategy
from search.supernet import open_candidates, super_layers
from search.tasks import Task, wrap

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = ScatteredDigits(length=40)


def make() -> tuple[Task, SearchTask]:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 7, 4, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
    task = wrap(convert_to_supernet(nn.Sequential(*layers), 9, inplace=True), num_classes=10)
    return task, SearchTask.of(task.network, [torch.randn(2, 3, 32, 32)])


def options_for(folder: Path, until: int | None = None) -> TrainOptions:
    options = TrainOptions(
        folder, steps=9, batch_size=2, device="cpu", workers=0, progress=False, resume=True
    )
    return replace(options, until=until)


def left(search: SearchTask) -> NDArray[np.bool_]:
    assert search.supernet is not None
    (layer,) = super_layers(search.supernet).values()
    return open_candidates(layer)


def test_searches_on_the_way_leave_their_candidates_and_zeros(tmp_path: Path) -> None:
    task, search = make()
    assert left(search).all()
    train(task, DATA, options_for(tmp_path), [NarrowHook((3, 6), EDOStrategy(), search)])
    assert (left(search).sum(1) == 3).all()  # of 16, then 7
    (layer,) = EDOStrategy().search(search).layers
    kept = [{search.space.candidates[i] for i in np.flatnonzero(row)} for row in left(search)]
    assert all(dilation in own for dilation, own in zip(layer.assignment or (), kept, strict=True))


def test_a_training_that_was_stopped_between_searches_ends_the_same(tmp_path: Path) -> None:
    weights = []
    for stops in ([None], [3, 5, 6, None]):
        for until in stops:
            task, search = make()
            options = options_for(tmp_path / str(len(stops)), until)
            train(task, DATA, options, [NarrowHook((3, 6), EDOStrategy(), search)])
        weights.append(task.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_search_does_not_disturb_the_training(tmp_path: Path) -> None:
    class KeepsAll:
        def narrowed(self, task: SearchTask, count: int) -> dict[str, NDArray[np.bool_]]:
            torch.rand(3)
            return {name: np.ones((units, 16), dtype=bool) for name, units in task.units.items()}

    weights = []
    for hooked in (False, True):
        task, search = make()
        task.network.append(nn.Dropout())
        hooks = [NarrowHook((3,), KeepsAll(), search)] if hooked else []
        train(task, DATA, options_for(tmp_path / str(hooked)), hooks)
        weights.append(task.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_dead_units_have_every_candidate() -> None:
    _, search = make()
    assert search.supernet is not None
    layer = super_layers(search.supernet)["2"]
    with torch.no_grad():
        layer.weight[:4] = 0  # the first group
    assert left(search).tolist() == [[True] * 16] * 2
    with torch.no_grad():
        layer.weight[4:] *= search.space.tap_masks()[5]
    assert np.flatnonzero(left(search)[1]).tolist() == [5]
