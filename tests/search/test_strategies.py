# SPDX-License-Identifier: Apache-2.0
"""The contract of every strategy: a new one adds a row to CASES."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ic_conv import DilationPattern
from search import STRATEGIES, SearchTask, convert_to_supernet, edo
from search.assign import unit_errors
from search.criteria import energy
from search.latency import Kind, LatencyTable, Row
from search.statistics import collect
from search.strategies import EDOStrategy, HandStrategy, ParetoOptions, PlainTask, UniformStrategy
from search.study import StudyOptions

KINDS = {"0": Kind(3, 40, 1, 1, 16, 16), "2": Kind(40, 32, 8, 1, 16, 16)}
ROWS = [
    Row(kind, tuple(((1, d + 1), units // count) for d in range(count)), float(count))
    for kind, units in zip(KINDS.values(), (40, 8), strict=True)
    for count in (1, 2, 4)
]
TABLE = LatencyTable("abacus", "small", 1, 1, 16, KINDS, 1.0, tuple(ROWS))

CASES: list[tuple[str, dict[str, Any]]] = [
    ("edo", {}),
    ("edo", {"criterion": "mse"}),
    ("random", {}),
    ("uniform", {"dilation": (2, 3)}),
    ("hand", {}),
    ("pareto", {"options": ParetoOptions(TABLE, study=StudyOptions(trials=8))}),
    ("edo", {"criterion": "refit"}),
    ("gradient", {}),
    ("gradient", {"validation_steps": 1}),
    ("rfnext", {"steps": 4, "updates": 2}),
    ("darts", {"steps": 2}),
    ("single-path", {"steps": 2, "trials": 3}),
    ("histogram", {"steps": 4, "study": StudyOptions(name="h", sampler="tpe", pruner="median", trials=7)}),
    ("histogram", {"steps": 4, "study": StudyOptions(name="h", trials=3), "latency": TABLE}),
]


def small_task(seed: int = 0, data_seed: int = 0) -> SearchTask:
    torch.manual_seed(data_seed)
    layers = nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 32, 3, padding=1, groups=8)
    supernet = convert_to_supernet(nn.Sequential(*layers), 9)
    plain = nn.Sequential(*layers)
    samples = [torch.randn(2, 3, 16, 16) for _ in range(4)]
    task = SearchTask.of(supernet, [torch.randn(2, 3, 16, 16)], seed)
    return replace(
        task, plain=PlainTask(plain, plain, lambda: samples, lambda net, x: net(x).square().mean())
    )


def test_every_strategy_is_tested() -> None:
    assert {name for name, _ in CASES} == set(STRATEGIES)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_pattern_fits_the_network_it_was_found_for(name: str, options: dict[str, Any]) -> None:
    pattern = STRATEGIES[name](**options).search(small_task())
    assert [(layer.name, layer.units) for layer in pattern.layers] == [("0", 40), ("2", 8)]
    assert pattern.kernel == 9 and pattern.bind([("0", 40), ("2", 8)]) == pattern


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_same_task_gives_the_same_pattern(name: str, options: dict[str, Any]) -> None:
    first, second = (STRATEGIES[name](**options).search(small_task()) for _ in range(2))
    assert first == second


# By its path: an installed package may be called tests too.
FRESH = """
import runpy, sys
from search import STRATEGIES
here = runpy.run_path("tests/search/test_strategies.py")
for index, (name, options) in enumerate(here["CASES"]):
    STRATEGIES[name](**options).search(here["small_task"]()).save(f"{sys.argv[1]}/{index}.json")
"""


def test_a_fresh_process_writes_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(folders):
        folder.mkdir()
        environment = {"PYTHONHASHSEED": str(index + 1), "OMP_NUM_THREADS": str(index + 1)}
        subprocess.run(
            [sys.executable, "-c", FRESH, folder],
            check=True,
            env={**environment},
            cwd=Path(__file__).parents[2],
        )
    for index in range(len(CASES)):
        for suffix in (".json", ".meta.json"):
            a, b = (folder / f"{index}{suffix}" for folder in folders)
            assert a.read_bytes() == b.read_bytes(), CASES[index]


@pytest.mark.parametrize("name", ["random", "hand"])
def test_another_seed_gives_another_pattern(name: str) -> None:
    assert STRATEGIES[name]().search(small_task(seed=1)) != STRATEGIES[name]().search(small_task(seed=2))


def test_edo_finds_the_taps_that_hold_the_weight() -> None:
    task = small_task()
    assert isinstance(task.supernet, nn.Sequential)
    expected = [task.space.candidates[index % 16] for index in range(40)]
    masks = task.space.tap_masks()
    with torch.no_grad():
        for channel in range(40):
            task.supernet[0].weight[channel] = masks[channel % 16] + 0.01
    pattern = edo(task.supernet, task.batches())
    assert list(pattern.layers[0].assignment or ()) == expected
    keys = {"criterion", "layer_error", "candidate_error", "criteria_error", "layer_stride"}
    assert set(pattern.meta) == keys


def test_what_other_criteria_choose_loses_more() -> None:
    task = small_task()
    moments = collect(task.supernet, task.batches(), task.space)  # type: ignore[arg-type]
    pattern = EDOStrategy().from_moments(task, moments)
    assert set(pattern.meta["criteria_error"]) == {"expectation", "taps"}
    for name, found in pattern.meta["criteria_error"].items():
        other = EDOStrategy(name).from_moments(task, moments).layers[1]
        errors = unit_errors(energy(moments["2"], task.space), 8)
        chosen = [
            errors[unit, task.space.candidates.index(d)] for unit, d in enumerate(other.assignment or ())
        ]
        assert found["2"] == pytest.approx(sum(chosen) / 8, abs=1e-6)
        assert found["2"] > pattern.meta["layer_error"]["2"]


def test_hand_rule_has_its_shares() -> None:
    pattern = HandStrategy().search(small_task())
    first, later = pattern.layers
    assert first.plain_share == 0.5 and later.plain_share == 6 / 8
    dilated = [count for dilation, count in first.branches if dilation != (1, 1)]
    assert len(dilated) == 15 and max(dilated) - min(dilated) <= 1


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"share of plain units must lie between 0 and 1, got 1\.5"):
        HandStrategy(first_plain=1.5)
    with pytest.raises(ValueError, match="unknown criterion"):
        EDOStrategy("foo")
    with pytest.raises(ValueError, match="dilations of kernel 9 reach 4, got 5"):
        UniformStrategy((5, 1)).search(small_task())
    with pytest.raises(ValueError, match="needs a trained supernet"):
        task = small_task()
        EDOStrategy().search(SearchTask(task.space, task.units))


def test_the_file_of_a_found_pattern_reads_back(tmp_path: Path) -> None:
    pattern = EDOStrategy().search(small_task())
    pattern.save(tmp_path / "p.json")
    assert DilationPattern.load(tmp_path / "p.json") == pattern
