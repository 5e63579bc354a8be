# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ic_conv import DilationPattern, LayerPattern
from search.compare import SUPERNET, CompareOptions, methods, run, shuffled, slim_resnet, table
from search.supernet import convert_to_supernet, super_layers


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
    options = CompareOptions(tmp_path, steps=2, batch_size=4, val_images=16)
    assert run(SUPERNET, 0, options)["plain_share"] == 1
    found = run("edo energy", 0, options)
    assert 0 <= found["mAP"] <= 100 and 0 < found["plain_share"] < 1
    record = tmp_path / "seed0/edo_energy.result.json"
    document = json.loads(record.read_text())
    document["result"]["mAP"] = -1.0
    record.write_text(json.dumps(document))
    assert run("edo energy", 0, options)["mAP"] == -1
    with pytest.raises(ValueError, match="choose another --work-dir"):
        run("edo energy", 0, CompareOptions(tmp_path, steps=3, batch_size=4, val_images=16))


def test_table_shows_mean_and_spread() -> None:
    runs = [
        {"mAP": v, "mAP_small": 1, "mAP_medium": 2, "mAP_large": 3, "plain_share": 0.5} for v in (80.0, 84.0)
    ]
    assert "| plain | 82.0 ± 2.8 | 1.0 ± 0.0 | 2.0 ± 0.0 | 3.0 ± 0.0 | 50.0 ± 0.0 |" in table({"plain": runs})
    assert "| plain | 80.0 | 1.0 | 2.0 | 3.0 | 50.0 |" in table({"plain": runs[:1]})


def test_methods_name_every_criterion_and_control() -> None:
    wanted = {
        "plain",
        "plain x2 steps",
        "edo energy",
        "edo energy shuffled",
        "edo mse",
        "hand",
        "uniform",
        "random",
    }
    assert wanted <= set(methods())
