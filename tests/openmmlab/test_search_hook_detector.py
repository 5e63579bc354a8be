# SPDX-License-Identifier: Apache-2.0
"""The search within a detector's training, by the command lines."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import mmengine
import pytest
import torch

from ic_conv import DilationPattern
from tests.openmmlab.commands import command
from tests.openmmlab.generated import write_data

DETECTOR = """
_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
custom_hooks = [dict(type="DilationSearchHook", calibration_batches=2)]
model = dict(
    backbone=dict(_delete_=True, type="SuperResNet", depth=18, kernel_size=5, base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64]),
    bbox_head=dict(num_classes=3),
    test_cfg=dict(score_thr=0, nms_pre=50),
)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(128, 96), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
data = dict(data_root="data/coco/", pipeline=pipeline)
loader = dict(num_workers=0, persistent_workers=False, dataset=data)
train_dataloader = dict(batch_size=2, **loader)
val_dataloader = loader
test_dataloader = loader
train_cfg = dict(max_epochs=2)
"""


@pytest.fixture
def detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    write_data(tmp_path / "data")
    (tmp_path / "task.py").write_text(DETECTOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_a_detector_is_trained_searched_resumed_and_tested(plain: bool, detector: Path) -> None:
    if plain:
        text = DETECTOR.replace('"SuperResNet", depth=18, kernel_size=5', '"ICResNet", depth=18')
        hook = 'strategy="gradient", at=1, kernel_size=5, calibration_batches=2'
        (detector / "task.py").write_text(text.replace("calibration_batches=2", hook))
    train_tool, test_tool = command("train"), command("test")
    assert train_tool("task.py", "--work-dir", "run") == 0
    pattern = DilationPattern.load("run/pattern.json")
    assert (len(pattern.layers), pattern.kernel) == (16, 5)
    assert (pattern.meta["architecture"], pattern.meta["data"]) == ("task", "CocoDataset")
    more = ["--cfg-options", "train_cfg.max_epochs=3"]
    assert train_tool("task.py", "--work-dir", "run", "--resume", *more) == 0
    second, third = (torch.load(f"run/epoch_{n}.pth", weights_only=False)["state_dict"] for n in (2, 3))
    assert second.keys() == third.keys()
    Path("found.py").write_text(
        "_base_ = './task.py'\ncustom_hooks = []\n"
        "model = dict(backbone=dict(_delete_=True, type='ICResNet', depth=18, base_channels=8, "
        "pattern='run/pattern.json'))\n"
    )
    boxes = []
    for config in ("task", "found"):  # the first config takes up the checkpoint's layers
        assert test_tool(f"{config}.py", "run/epoch_3.pth", "--work-dir", config, "--out", "boxes.pkl") == 0
        boxes.append([image["pred_instances"]["scores"] for image in mmengine.load("boxes.pkl")])
    assert all(len(one) and torch.equal(one, two) for one, two in zip(*boxes, strict=True))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("calibration_batches=2", "criterion='best'", "unknown criterion 'best'; known ones: energy"),
        ("calibration_batches=2", "at=[1, 3]", "at must lie within the training's 2 epochs, got 3"),
        ("SuperResNet", "ICResNet", "must be a supernet (type='SuperResNet'), got ICResNet"),
    ],
)
def test_a_config_that_cannot_search_is_one_line(
    old: str, new: str, message: str, detector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DETECTOR.replace(old, new).replace(
        "kernel_size=5, ", "" if new == "ICResNet" else "kernel_size=5, "
    )
    name = f"experiment_name = '{uuid.uuid4().hex}'"  # MMEngine keeps what a run logs to under its name
    (detector / "task.py").write_text(f"{text}\n{name}\n")
    assert command("train")("task.py") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == error.count("error:") == 1, error
