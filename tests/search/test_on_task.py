# SPDX-License-Identifier: Apache-2.0
"""The search on a detector's own supernet and data."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ic_conv import DilationPattern

pytest.importorskip("mmdet", reason="MMDetection is not installed")
from mmengine.registry import MODELS, init_default_scope

from ic_conv.openmmlab.runner import load_config
from tests.openmmlab.generated import write_data

ROOT = Path(__file__).parents[2]
CONFIG = """
_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
model = dict(backbone=dict(_delete_=True, type="SuperResNet", depth=18, kernel_size=5))
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
    return lambda *arguments: module.main(["--config", "task.py", *map(str, arguments)])


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
            "epoch_1.pth: backbone.layer1.0.conv1.weight is (64, 64, 5, 5) in the file, (64, 64, 7, 7)",
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
