# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mmpose")

from mmengine.registry import DefaultScope

from ic_conv.openmmlab.pose.drawn_people import write_people
from ic_conv.pattern import DilationPattern
from search.compare.people import METHODS, SUPERNET, PeopleOptions, run, task_config
from tests.openmmlab.commands import command

SMALL = {
    "steps": 3,
    "batch_size": 2,
    "image_size": 64,
    "base_channels": 4,
    "train_images": 4,
    "val_images": 2,
}


@pytest.fixture(autouse=True)
def no_scope() -> Iterator[None]:
    yield
    DefaultScope._instance_dict.clear()


def test_networks_differ_in_the_backbone_alone(tmp_path: Path) -> None:
    options = PeopleOptions(tmp_path)
    plain, found, supernet = (task_config(name, 0, options) for name in ("plain", "edo energy", SUPERNET))
    assert "pattern" not in plain.model.backbone
    assert found.model.backbone.pop("pattern").endswith("seed0/edo_energy.json")
    assert supernet.model.backbone.pop("kernel_size") == options.kernel
    assert supernet.model.backbone.type == "SuperResNet"
    supernet.model.backbone.type = plain.model.backbone.type
    assert supernet.train_cfg.max_iters == options.supernet_steps
    supernet.train_cfg = plain.train_cfg  # where the test begins depends on it
    for config in (plain, found, supernet):
        for own in ("work_dir", "experiment_name", "visualizer"):
            config.pop(own)
    assert plain.to_dict() == found.to_dict() == supernet.to_dict()


@pytest.mark.slow
def test_a_pattern_is_found_and_trained_and_finished_runs_stay(tmp_path: Path) -> None:
    options = PeopleOptions(tmp_path, **SMALL)
    write_people(tmp_path / "people", {"train": options.train_images, "val": options.val_images})
    assert run(SUPERNET, 0, options)["plain_share"] == 1
    found = run("edo energy", 0, options)
    assert 0 <= found["AP"] <= 100 and 0 < found["plain_share"] < 1
    assert len(DilationPattern.load(tmp_path / "seed0/edo_energy.json").layers) == 8
    record = tmp_path / "seed0/edo_energy.result.json"
    document = json.loads(record.read_text())
    document["result"]["AP"] = -1.0
    record.write_text(json.dumps(document))
    assert run("edo energy", 0, options)["AP"] == -1
    with pytest.raises(ValueError, match="choose another --work-dir"):
        run("edo energy", 0, replace(options, steps=4))


@pytest.mark.parametrize(("stages", "channels"), [(1, []), (2, [64]), (3, [128, 128])])
def test_heatmaps_are_a_quarter_of_the_image(stages: int, channels: list[int], tmp_path: Path) -> None:
    config = task_config("plain", 0, PeopleOptions(tmp_path, stages=stages))
    assert list(config.model.head.deconv_out_channels) == channels
    assert config.model.backbone.out_indices == (stages - 1,)


@pytest.mark.slow
def test_a_growing_network_pays_for_its_search(tmp_path: Path) -> None:
    options, name = (
        PeopleOptions(tmp_path, **SMALL | {"steps": 300, "val_images": 1}),
        "gradient grown quarter",
    )
    config = task_config(name, 0, options)
    assert config.train_cfg.max_iters == config.param_scheduler[1].end == 300 - 256
    assert config.custom_hooks[-1]["at"] == 44 // 8
    write_people(tmp_path / "people", {"train": options.train_images, "val": options.val_images})
    assert run(name, 0, options)["plain_share"] == 0.75
    meta = DilationPattern.load(tmp_path / "seed0/gradient_grown_quarter/pattern.json").meta
    assert meta["training"] == {"iterations": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "plain,edo best"], f"unknown method 'edo best'; known ones: {', '.join(METHODS)}"),
        (["--steps", "2"], "steps must be at least 3, got 2"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("compare")("people", *arguments) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: {message}"
