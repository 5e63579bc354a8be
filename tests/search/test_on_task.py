# SPDX-License-Identifier: Apache-2.0
"""The search on a detector's own supernet and data."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ic_conv import DilationPattern
from ic_conv.checkpoint import read_weights

pytest.importorskip("mmdet", reason="MMDetection is not installed")
from mmengine.registry import MODELS, init_default_scope

from ic_conv.openmmlab.runner import load_config
from tests.openmmlab.generated import write_data

ROOT = Path(__file__).parents[2]
CONFIG = """
_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type="SuperResNet", depth=18, kernel_size=5, base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64]),
)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(128, 96), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root="data/coco/", pipeline=pipeline),
)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, the config of a detector with a supernet, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("task")
    write_data(folder / "data")
    (folder / "task.py").write_text(CONFIG)
    config = load_config(folder / "task.py")
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    torch.save({"meta": {}, "state_dict": model.state_dict()}, folder / "epoch_1.pth")
    return folder


@pytest.fixture
def search(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """tools/search.py --config task.py in that folder."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("tools_search", ROOT / "tools/search.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)  # would outlast the test

    def run(*arguments: object, config: str = "task.py") -> int:
        return int(module.main(["--config", config, *map(str, arguments)]))

    return run


@pytest.mark.slow
def test_finds_the_pattern_of_a_detectors_backbone(
    trained: Path, search: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--checkpoint", "epoch_1.pth", "--work-dir", "run") == 0
    found = DilationPattern.load("run/task.json")
    assert [layer.name for layer in found.layers][:2] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert (len(found.layers), found.kernel) == (16, 5)
    printed = capsys.readouterr().out
    backbone = next(line for line in printed.splitlines() if line.startswith("  backbone="))
    Path("found.py").write_text(f"_base_ = './task.py'\nmodel = dict({backbone.strip()})\n")
    init_default_scope("mmdet")
    network = MODELS.build(load_config("found.py").model).backbone
    assert network.layer1[0].conv1.pattern.branches == found.layers[0].branches
    assert search("--checkpoint", "epoch_1.pth", "--work-dir", "again") == 0
    for name in ("task.json", "task.meta.json"):
        assert Path("again", name).read_bytes() == Path("run", name).read_bytes()


PLAIN = """
_base_ = "./task.py"
model = dict(backbone=dict(_delete_=True, type="ICResNet", depth=18, base_channels=8, frozen_stages=1))
"""


def result(printed: str, base: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The backbone that the command says to use, with its weights, and these."""
    backbone = next(line for line in printed.splitlines() if line.startswith("  backbone="))
    Path("found.py").write_text(f"_base_ = './{base}'\nmodel = dict({backbone.strip()})\n")
    init_default_scope("mmdet")
    network = MODELS.build(load_config("found.py").model).backbone
    network.init_weights()
    return network, read_weights(printed.split("weights  ")[1].split()[0])[0]


@pytest.mark.parametrize("init", ["crop", "refit"])
def test_writes_weights_that_the_named_backbone_takes(
    init: str, trained: Path, search: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--checkpoint", "epoch_1.pth", "--init", init, "--work-dir", init) == 0
    network, weights = result(capsys.readouterr().out, "task.py")
    state = network.state_dict()
    assert sorted(state) == sorted(weights)
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert any(name.endswith("branches") for name in weights)
    supernet = torch.load("epoch_1.pth", weights_only=True)["state_dict"]["backbone.layer1.0.conv1.weight"]
    kept = torch.isin(weights["layer1.0.conv1.weight"], supernet).float().mean()
    assert kept == 1 if init == "crop" else kept < 0.1


def test_gradient_takes_a_plain_detector(
    trained: Path, search: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plain.py").write_text(PLAIN)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    torch.save({"state_dict": MODELS.build(load_config("plain.py").model).state_dict()}, "plain.pth")
    arguments = ["--strategy", "gradient", "--kernel", 7, "--init", "refit", "--checkpoint", "plain.pth"]
    assert search(*arguments, "--work-dir", "plain", config="plain.py") == 0
    found = DilationPattern.load("plain/plain.json")
    assert (len(found.layers), found.kernel) == (16, 7)
    assert {layer.plain_share for layer in found.layers} == {0.5}
    network, weights = result(capsys.readouterr().out, "plain.py")
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert network.layer1[0].conv1.pattern.branches == found.layers[0].branches
    assert network.frozen_stages == 1


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ((), {}, "train it first with `python tools/train.py task.py`"),
        (("--checkpoint", "epoch_1.pth", "--kernel", 13), {}, "--kernel: task.py decides that"),
        (
            ("--checkpoint", "epoch_1.pth"),
            {"SuperResNet": "ICResNet", ", kernel_size=5": ""},
            "must be a supernet",
        ),
        (
            ("--checkpoint", "epoch_1.pth"),
            {"kernel_size=5": "kernel_size=7"},
            "epoch_1.pth: backbone.layer1.0.conv1.weight is (8, 8, 5, 5) in the file, (8, 8, 7, 7)",
        ),
        (("--checkpoint", "epoch_1.pth"), {"data/coco/": "data/none/"}, "train_dataloader.dataset"),
        (("--checkpoint", "epoch_1.pth"), {"depth=18": "depth=19"}, "model.backbone.depth: must be one of"),
    ],
)
def test_what_does_not_fit_is_one_line(
    trained: Path,
    search: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    change: dict[str, str],
    message: str,
) -> None:
    text = CONFIG
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    Path("task.py").write_text(text)
    try:
        assert search(*arguments) == 2
    finally:
        Path("task.py").write_text(CONFIG)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == error.count("\n") == 1, error
