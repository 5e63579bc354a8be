# SPDX-License-Identifier: Apache-2.0
"""Strategies that train: planted dilations are found, and their parts do what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from search.latency import Kind, LatencyTable, Row
from search.space import DilationSpace
from search.strategies import (
    STRATEGIES,
    DartsStrategy,
    HistogramStrategy,
    PlainTask,
    RFNextStrategy,
    SearchTask,
    SinglePathStrategy,
)
from search.strategies._training import batches_after, fit, grown_copy, held_out, network_inputs
from search.strategies.darts import SoftTaps
from search.strategies.histogram import dealt
from search.strategies.single_path import OnePath
from search.study import StudyOptions

SPACE = DilationSpace(5)  # (1, 1), (1, 2), (2, 1), (2, 2)
TABLE = LatencyTable("abacus", "none", 1, 1, 16, {}, 1.0, ())
STUDY = StudyOptions(name="h", sampler="tpe", pruner="median", trials=16)


def planted(dilation: int, batches: int = 8) -> SearchTask:
    """A layer whose 3x3 weights are right, at another dilation than its own."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    images = [torch.randn(4, 3, 12, 12) for _ in range(batches)]
    weight = network[0].get_parameter("weight").detach().clone()

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        wanted = nn.functional.conv2d(x, weight, padding=dilation, dilation=dilation)
        return (model(x) - wanted).square().mean()

    return SearchTask.of_plain(PlainTask(network, network, lambda: images, loss), SPACE, seed=0)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rfnext", {"steps": 60, "updates": 3}),
        ("darts", {"steps": 60}),
        ("single-path", {"steps": 40, "trials": 60, "parts": 2}),
    ],
)
def test_a_planted_dilation_is_found(name: str, options: dict[str, Any], dilation: int) -> None:
    pattern = STRATEGIES[name](**options).search(planted(dilation))
    assert pattern.layers[0].counts == {(dilation, dilation): 8}


@pytest.mark.parametrize(("dilation", "least", "most"), [(1, 0.85, 1.0), (2, 0.0, 0.15)])
def test_a_planted_mix_is_found(dilation: int, least: float, most: float) -> None:
    pattern = HistogramStrategy(steps=8, study=STUDY).search(planted(dilation))
    assert least <= pattern.layers[0].plain_share <= most
    assert pattern.meta["trials"] == 16 and set(pattern.meta["params"]) == {"network.plain", "network.spread"}


def test_latency_is_a_second_objective() -> None:
    kind = Kind(3, 8, 1, 1, 12, 12)
    rows = (Row(kind, (((1, 1), 8),), 1.0), Row(kind, tuple(((1, 1 + d), 2) for d in range(4)), 9.0))
    table = LatencyTable("abacus", "small", 1, 1, 12, {"0": kind}, 1.0, rows)
    pattern = HistogramStrategy(4, replace(STUDY, pruner="none", trials=3), table).search(planted(2))
    assert pattern.meta["latency_ms"] == pytest.approx(table.predict(pattern), abs=1e-4)


def test_channels_are_dealt_by_share_spread_and_error() -> None:
    rng = np.random.default_rng(0)
    errors = rng.random((20, 4))
    errors[5:15, 0] = -1.0  # these stay plain at least error
    layer = dealt(errors, SPACE, 0.5, 10.0, "a")
    assert [unit for unit, d in enumerate(layer.assignment or ()) if d == (1, 1)] == list(range(5, 15))
    counts = Counter(layer.assignment or ())
    assert counts[(1, 2)] + counts[(2, 1)] + counts[(2, 2)] == 10 and min(counts.values()) >= 3
    near = dealt(errors, SPACE, 0.0, 0.3, "a").counts
    assert near == {(1, 2): 10, (2, 1): 10} or near.get((2, 2), 0) <= 1
    assert dealt(errors, SPACE, 1.0, 1.0, "a").counts == {(1, 1): 20}


def test_grown_copies_hold_the_plain_weights_at_every_dilation() -> None:
    task = planted(1)
    assert task.plain is not None
    _, layers = grown_copy(task, task.plain)
    plain = task.plain.network.get_parameter("0.weight")
    for taps in SPACE.taps:
        assert layers["0"].weight.flatten(2)[:, :, taps].equal(plain.flatten(2))
    assert "0.weight" in dict(task.plain.network.named_parameters())  # itself it stays plain


def test_soft_taps_mix_candidates_and_paths_keep_one() -> None:
    weight = torch.randn(4, 3, 5, 5)
    masks = SPACE.tap_masks()
    soft, path = SoftTaps(SPACE, 2), OnePath(SPACE, 2)
    assert soft(weight)[0, 0, 0, 0] == weight[0, 0, 0, 0] / 4  # a corner is in one of four candidates
    with torch.no_grad():
        soft.logits[0, 3] = soft.logits[1, 1] = 50.0
    path.choice = torch.tensor([3, 1])
    wanted = weight * torch.stack([masks[3], masks[3], masks[1], masks[1]])[:, None]
    torch.testing.assert_close(soft(weight), wanted)
    assert path(weight).equal(wanted)


def test_held_out_batches_are_not_trained_on() -> None:
    plain = planted(1, batches=8).plain
    assert plain is not None
    held = held_out(plain)
    assert len(held) == 2 and all(a is b for a, b in zip(held, plain.samples(), strict=False))
    rest = batches_after(plain, 2)
    seen = [next(rest) for _ in range(12)]
    assert seen[0] is seen[6] and not any(batch is other for batch in seen for other in held)
    with pytest.raises(ValueError, match="at least 4, got 3"):
        held_out(planted(1, batches=3).plain)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beyond the 8"):
        next(batches_after(plain, 8))


def test_what_the_network_is_given_of_a_batch() -> None:
    """OpenMMLab's batches hold lists, and the model prepares them."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout()).train()
    batches = [{"inputs": [torch.full((3, 6, 6), float(index))] * 2} for index in range(3)]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(torch.stack(batch["inputs"]) / 2).square().mean()

    plain = PlainTask(network, network, lambda: batches, loss)
    seen = network_inputs(plain, batches[1:])
    assert [images.shape for images in seen] == [(2, 3, 6, 6)] * 2 and [x.mean() for x in seen] == [0.5, 1.0]
    assert network.training and not network[1].running_mean.any() and not network._forward_pre_hooks
    found = HistogramStrategy(steps=4, study=replace(STUDY, trials=1)).search(
        SearchTask.of_plain(replace(plain, samples=lambda: batches * 2), SPACE)
    )
    assert found.layers[0].units == 4


def test_a_training_draws_by_its_seed_and_leaves_the_world_s_draws_alone() -> None:
    def trained(seed: int, drawn: int) -> torch.Tensor:
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())
        plain = PlainTask(network, network, list, lambda net, x: net(x).square().mean())
        torch.rand(drawn)
        state = torch.get_rng_state()
        fit(network, plain, iter([torch.ones(1, 3, 5, 5)] * 3), 3, seed=seed)
        assert torch.get_rng_state().equal(state)
        return network[0].get_parameter("weight").detach()

    assert trained(3, 0).equal(trained(3, 5)) and not trained(3, 0).equal(trained(4, 0))


def test_a_study_is_of_its_weights_and_images(tmp_path: Path) -> None:
    strategy = HistogramStrategy(4, replace(STUDY, storage=str(tmp_path / "study.journal"), trials=1))
    task = planted(1)
    assert task.plain is not None
    strategy.search(task)
    other = [batch + 1 for batch in task.plain.samples()]
    with pytest.raises(ValueError, match="made with other options: validation "):
        strategy.search(replace(task, plain=replace(task.plain, samples=lambda: other)))
    with torch.no_grad():
        task.plain.network.get_parameter("0.weight").mul_(2)
    with pytest.raises(ValueError, match="made with other options: weights "):
        strategy.search(task)
    with pytest.raises(ValueError, match="made with other options: steps 4, now 8"):
        HistogramStrategy(8, strategy.study).check(task)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("darts", {"steps": 2}, "search step 1/2 ETA"),
        ("rfnext", {"steps": 5, "updates": 2}, "search step 4/4 ETA"),
        ("single-path", {"steps": 2, "trials": 3}, "trial 3/3 ETA"),
        ("histogram", {"steps": 4, "study": replace(STUDY, trials=2)}, "trial 2/2 ETA"),
    ],
)
def test_progress_is_shown_on_demand(
    name: str, options: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    STRATEGIES[name](**options).search(planted(1))
    assert capsys.readouterr() == ("", "")
    STRATEGIES[name](**options, progress=True).search(planted(1))
    assert told in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RFNextStrategy(steps=3, updates=4), "between 1 and the steps, got 4 and 3"),
        (lambda: RFNextStrategy(expansion=0), "between 0 and 1, got 0"),
        (lambda: DartsStrategy(lr=-1), "must be positive, got 200 and -1"),
        (lambda: SinglePathStrategy(parts=0), "must be positive, got 200, 50 and 0"),
        (lambda: HistogramStrategy(steps=3), "at least 4 steps, got 3"),
        (lambda: StudyOptions(pruner="shears"), "none, median, halving; got 'shears'"),
        (lambda: DartsStrategy().search(SearchTask(SPACE, {"0": 8})), "needs a trained plain network"),
        (
            lambda: HistogramStrategy(study=StudyOptions("s.log", jobs=2)),
            "take one job, got 2",
        ),
        (
            lambda: HistogramStrategy(study=STUDY, latency=TABLE),
            "two need pruner none; got median",
        ),
        (
            lambda: HistogramStrategy(latency=TABLE).check(planted(1)),
            "the pattern has 1 layers, the network 0",
        ),
    ],
)
def test_bad_options_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
