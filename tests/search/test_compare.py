# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ic_conv import DilationPattern, LayerPattern
from search.compare import (
    PLAIN,
    SUPERNET,
    CompareOptions,
    compare,
    draw,
    methods,
    pattern_of,
    run,
    runs,
    shuffled,
    slim_resnet,
    table,
    with_cost,
    with_needs,
)
from search.compare.finders import Towards
from search.compare.setting import CALIBRATION, training_flops
from search.engine.checkpoint import FINAL, STATE, read_checkpoint
from search.strategies import STRATEGIES, SearchTask
from search.supernet import convert_to_supernet, super_layers

GROWN = "gradient grown"


def small(folder: Path, steps: int = 2) -> CompareOptions:
    return CompareOptions(folder, steps=steps, batch_size=4, val_images=16)


def test_shuffling_keeps_the_mix_and_the_units() -> None:
    first = LayerPattern.from_counts({(1, 1): 10, (2, 2): 6}, "a")
    second = LayerPattern.from_counts({(4, 4): 8}, "b")
    pattern = DilationPattern((first, second), 9)
    dealt = shuffled(pattern, seed=0)
    assert [(layer.name, layer.units) for layer in dealt.layers] == [("a", 16), ("b", 8)]
    mix = Counter(d for layer in dealt.layers for d in layer.assignment or ())
    assert mix == {(1, 1): 10, (2, 2): 6, (4, 4): 8} and dealt != pattern
    assert shuffled(pattern, 0) == dealt != shuffled(pattern, 1)


def test_slim_resnet_has_four_searched_layers() -> None:
    assert len(super_layers(convert_to_supernet(slim_resnet(), 9))) == 4


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    options = small(tmp_path)
    assert run(SUPERNET, 0, options)["plain_share"] == 1
    found = run("edo energy", 0, options)
    assert 0 <= found["mAP"] <= 100 and 0 < found["plain_share"] < 1
    record = tmp_path / "seed0/edo_energy.result.json"
    document = json.loads(record.read_text())
    document["result"]["mAP"] = -1.0
    record.write_text(json.dumps(document))
    assert run("edo energy", 0, options)["mAP"] == -1
    with pytest.raises(ValueError, match="choose another --work-dir"):
        run("edo energy", 0, small(tmp_path, steps=3))


@pytest.mark.slow
def test_a_refitted_network_starts_from_the_supernet(tmp_path: Path) -> None:
    options, name = small(tmp_path), "edo energy + refit"
    assert with_needs([name]) == [name, SUPERNET]
    run(SUPERNET, 0, options)
    task = runs._start(name, 0, options, pattern_of(name, 0, options))
    supernet = read_checkpoint(tmp_path / f"seed0/supernet.result/{FINAL}")["state_dict"]
    assert task.state_dict()["network.0.weight"].equal(supernet["network.0.weight"])
    run(name, 0, options)
    cost = with_cost(name, 0, options)
    grown, plain = training_flops(options.kernel), training_flops()
    # the supernet's 8 images, a pass to find the pattern and one to refit; the network's own 8 images
    assert cost["flops"] == (8 + 2 * CALIBRATION) * grown + 8 * plain
    assert cost["seconds"] > json.loads((tmp_path / "seed0/supernet.result.json").read_text())["seconds"]


@pytest.mark.parametrize("strategy", ["random", "hand"])
def test_narrowing_to_a_pattern_ends_with_it(strategy: str) -> None:
    task = SearchTask.of(convert_to_supernet(slim_resnet(), 9))
    pattern = STRATEGIES[strategy]().search(task)
    before = {name: np.ones((units, 16), dtype=bool) for name, units in task.units.items()}
    for count in (7, 3, 1):
        kept = Towards(pattern).narrowed(task, count)
        assert all((kept[name].sum(1) == count).all() for name in task.units)
        assert not any((kept[name] & ~before[name]).any() for name in task.units)
        before = kept
    for layer in pattern.layers:
        places = [task.space.candidates.index(dilation) for dilation in layer.dilations]
        assert before[str(layer.name)].argmax(1).tolist() == places


@pytest.mark.slow
def test_narrowed_supernets_are_made_before_what_starts_from_them(tmp_path: Path) -> None:
    name, supernet = "shuffled narrowed + refit", "supernet narrowed to shuffled"
    made = [method for method, _, _ in compare(small(tmp_path, steps=3), [name], [0], jobs=1)]
    assert made == ["supernet narrowed", supernet, name] == with_needs([name])[::-1]
    found = DilationPattern.load(tmp_path / "seed0/edo_narrowed.json")
    dealt = DilationPattern.load(tmp_path / "seed0/shuffled_narrowed.json")
    assert dealt.layers == shuffled(found, 0).layers
    weights = read_checkpoint(tmp_path / f"seed0/{supernet.replace(' ', '_')}.result/{FINAL}")["state_dict"]
    kept = weights["network.3.conv1.weight"].ne(0).flatten(2).any(1).sum(1)
    assert (kept < 27).all()  # three of sixteen dilations are left


@pytest.mark.slow
@pytest.mark.parametrize("at", ["find", "write_checkpoint", "evaluate"])
def test_an_interrupted_comparison_resumes(tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, folder = small(tmp_path / "broken", steps=80), tmp_path / "broken/seed0/gradient_grown.result"
    whole = run(GROWN, 0, small(tmp_path / "whole", steps=80))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        where = {
            "find": "search.strategies.gradient.GradientStrategy.search",
            "write_checkpoint": "search.compare.grow.write_checkpoint",
            "evaluate": "search.compare.runs.evaluate",
        }
        patch.setattr(where[at], stop)
        with pytest.raises(KeyboardInterrupt):
            run(GROWN, 0, options)
    kept = folder / (FINAL if at == "evaluate" else STATE)
    written = kept.stat().st_mtime_ns
    assert at == "evaluate" or read_checkpoint(kept)["step"] == 4
    assert run(GROWN, 0, options) == whole
    if at == "evaluate":
        assert kept.stat().st_mtime_ns == written  # not trained again


def test_a_growing_network_has_the_compute_of_its_peer() -> None:
    options = CompareOptions(Path())
    grown, plain = (methods()[name].flops(options) for name in (GROWN, "plain x2 steps"))
    assert grown == plain == 2 * methods()[PLAIN].flops(options)
    assert methods()[GROWN].training_steps(options) == 1184


def scores(**more: float) -> dict[str, float]:
    return {"mAP_small": 1, "mAP_medium": 2, "mAP_large": 3, "plain_share": 0.5, **more}


def test_table_shows_means_and_confidence_intervals() -> None:
    both = {0: scores(mAP=80.0), 1: scores(mAP=84.0)}
    half = 12.7062 * 2  # Student's t of one degree of freedom, times the mean's standard error
    row = f"| plain | 82.0 ± {half:.1f} | 1.0 ± 0.0 | 2.0 ± 0.0 | 3.0 ± 0.0 | 50.0 ± 0.0 | 2 |"
    assert table({PLAIN: both}).splitlines()[2] == row
    assert "| plain | 82.0 | 1.0 |" in table({PLAIN: {0: scores(mAP=82.0)}})
    people = {PLAIN: {0: {"AP": 4.0, "plain_share": 1.0}}, "found": {0: {"AP": 5.0, "plain_share": 0.5}}}
    head, *_, row = table(people, PLAIN, {"AP": "AP"}).splitlines()
    assert (head, row) == (
        "| method | AP | AP against plain | plain channels | seeds |",
        "| found | 5.0 | +1.0 | 50.0 | 1 |",
    )


def test_table_compares_seed_by_seed_and_counts_compute_in_plain_s() -> None:
    results = {
        PLAIN: {0: scores(mAP=80.0, flops=2.0), 1: scores(mAP=84.0, flops=2.0)},
        "found": {0: scores(mAP=81.0, flops=5.0), 1: scores(mAP=85.0, flops=5.0)},
    }
    title, _, plain, found = table(results, against=PLAIN).splitlines()
    assert "| mAP against plain |" in title and "total FLOPs" in title and "seconds" not in title
    assert found.endswith("| +1.0 ± 0.0 | 50.0 ± 0.0 | 2.50 | 2 |") and plain.endswith(
        "|  | 50.0 ± 0.0 | 1.00 | 2 |"
    )


def test_the_figure_needs_the_plain_network(tmp_path: Path) -> None:
    results = {PLAIN: {0: scores(mAP=80.0, flops=2.0)}, "found": {0: scores(mAP=81.0, flops=5.0)}}
    draw(results, tmp_path / "a/scores.svg")
    assert (tmp_path / "a/scores.svg").read_text().count("found") == 1
    with pytest.raises(ValueError, match="plain: it must be among the methods"):
        draw({"found": results["found"]}, tmp_path / "b.svg")


def test_methods_name_every_criterion_and_control() -> None:
    wanted = {
        "plain",
        "plain x2 steps",
        "edo energy",
        "edo energy + refit",
        "plain + refit",
        "edo energy shuffled",
        "edo mse",
        "hand",
        "uniform",
        "random",
    }
    assert wanted <= set(methods())
