# SPDX-License-Identifier: Apache-2.0
"""Every family of models trains, saves, resumes and is tested by the command lines, on generated data."""

from __future__ import annotations

import json
import math
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ic_conv.openmmlab.runner import ConfigError, load_config
from tests.openmmlab.commands import ROOT, command
from tests.openmmlab.generated import write_data


@dataclass(frozen=True)
class Family:
    """A config, and what makes it small. `steps` is the key of the length of training."""

    library: str
    config: str
    metric: str
    options: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return str(ROOT / "configs" / self.config)


SMALL_RPN = (
    "model.train_cfg.rpn_proposal.nms_pre=50",
    "model.train_cfg.rpn_proposal.max_per_img=20",
    "model.test_cfg.rpn.max_per_img=20",
    "model.test_cfg.rcnn.score_thr=0",
)
SMALL_ROI = (
    *SMALL_RPN,
    "model.roi_head.bbox_head.fc_out_channels=32",
    "model.roi_head.bbox_head.num_classes=3",
    "model.train_cfg.rcnn.sampler.num=16",
)
SMALL_CASCADE = (
    *SMALL_RPN,
    *(f"model.roi_head.bbox_head.{stage}.fc_out_channels=32" for stage in range(3)),
    *(f"model.roi_head.bbox_head.{stage}.num_classes=3" for stage in range(3)),
    "model.roi_head.mask_head.num_classes=3",
    *(f"model.train_cfg.rcnn.{stage}.sampler.num=16" for stage in range(3)),
)
CAREFUL = ("optim_wrapper.optimizer.lr=0.005", "optim_wrapper.clip_grad.max_norm=5")
RED26 = "model.backbone.depth=26"
FAMILIES = {
    "faster-rcnn": Family(
        "mmdet",
        "detection/faster-rcnn_rednet50_fpn-inv_head-inv_1x_coco.py",
        "coco/bbox_mAP",
        (*SMALL_ROI, RED26),
    ),
    "retinanet": Family(
        "mmdet",
        "detection/retinanet_rednet50_fpn-inv_1x_coco.py",
        "coco/bbox_mAP",
        ("model.bbox_head.num_classes=3", "model.test_cfg.score_thr=0", RED26),
    ),
    "mask-rcnn": Family(
        "mmdet",
        "instance_segmentation/mask-rcnn_cednet50_fpn-cvol_1x_coco.py",
        "coco/segm_mAP",
        (*SMALL_ROI, *CAREFUL, "model.roi_head.mask_head.num_classes=3", RED26),
    ),
    "cascade": Family(
        "mmdet",
        "instance_segmentation/cascade-mask-rcnn_ic-r50-k9_fpn_1x_coco.py",
        "coco/segm_mAP",
        (*SMALL_CASCADE, *CAREFUL),
    ),
    "semantic-fpn": Family(
        "mmseg", "segmentation/fpn-inv_rednet50_4xb2-80k_cityscapes-512x1024.py", "mIoU", (RED26,)
    ),
    "upernet": Family(
        "mmseg",
        "segmentation/upernet_ic-r50-k9_4xb2-80k_cityscapes-512x1024.py",
        "mIoU",
        ("model.decode_head.channels=64",),
    ),
    "classifier": Family("mmpretrain", "classification/rednet26_32xb64-130e_in1k.py", "accuracy/top1"),
}
EPOCHS = "train_cfg.max_epochs"
STEPS = 8
LENGTH = {
    "mmdet": (EPOCHS, 2, ("param_scheduler.0.end=2",)),
    "mmpretrain": (EPOCHS, 1, ("param_scheduler.0.end=2", "optim_wrapper.optimizer.lr=0.01")),
    "mmseg": ("train_cfg.max_iters", 1, ()),
}  # the key of the training's length, steps in one of its units, what makes the warm-up short


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(name: str, *arguments: object) -> int:
    """A command; MMEngine's loggers and visualizers are global, and another name gives each run its own."""
    own = f"run-{uuid.uuid4().hex}"
    names = ("--cfg-options", f"experiment_name={own}", f"visualizer.name={own}")
    return command(name)(*arguments, *names)


def small(family: Family, data: Path) -> list[str]:
    """--cfg-options for small images, few of them, without worker processes."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    options = [
        "model.backbone.init_cfg=None",
        "default_hooks.logger.interval=1",
        "default_hooks.checkpoint.interval=100",
        *(f"{loader}.num_workers=0" for loader in loaders),
        *(f"{loader}.persistent_workers=False" for loader in loaders),
        *LENGTH[family.library][2],
        *family.options,
    ]
    folder = {"mmdet": "coco", "mmseg": "cityscapes", "mmpretrain": "imagenet"}[family.library]
    options += [f"{loader}.dataset.data_root={data / folder}/" for loader in loaders]
    pipeline = "dataset.pipeline"
    if family.library == "mmdet":
        annotations = data / "coco/annotations/instances_val2017.json"
        options += [f"{split}_evaluator.ann_file={annotations}" for split in ("val", "test")]
        options += [
            f"{loader}.{pipeline}.{2 if loader == loaders[0] else 1}.scale=(128,96)" for loader in loaders
        ]
        options += ["model.backbone.frozen_stages=-1", "model.backbone.norm_eval=False"]
        options += ["train_cfg.val_interval=100"]
    elif family.library == "mmseg":
        options += [f"train_dataloader.{pipeline}.2.scale=(128,96)", "model.data_preprocessor.size=(64,64)"]
        options += [f"train_dataloader.{pipeline}.3.crop_size=(64,64)"]
        options += [f"{loader}.{pipeline}.1.scale=(128,96)" for loader in loaders[1:]]
    else:
        options += ["train_dataloader.batch_size=4"]
        options += [f"{loader}.{pipeline}.1.scale=64" for loader in loaders]
        options += [f"{loader}.{pipeline}.2.crop_size=64" for loader in loaders[1:]]
    return options


def log(work_dir: Path) -> list[dict[str, Any]]:
    """The logged training steps of the last run in a work folder."""
    last = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in last.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_trains_saves_resumes_and_is_tested(name: str, data: Path, tmp_path: Path) -> None:
    family = FAMILIES[name]
    key, unit, _ = LENGTH[family.library]
    options = small(family, data)
    arguments = [family.path, "--work-dir", tmp_path, "--cfg-options", *options]
    assert run("train", *arguments, f"{key}={STEPS // unit}", "randomness.seed=0") == 0
    losses = [line["loss"] for line in log(tmp_path)]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < sum(losses[:3])

    assert run("train", *arguments, f"{key}={STEPS // unit + 2}", "--resume") == 0
    assert log(tmp_path)[0]["step"] == STEPS + 1  # it went on
    checkpoint = (tmp_path / "last_checkpoint").read_text()
    assert Path(checkpoint).stem.endswith(f"_{STEPS // unit + 2}")

    results = tmp_path / "results"
    assert run("test", family.path, checkpoint, "--work-dir", results, "--cfg-options", *options) == 0
    metrics = json.loads(next(results.glob("*/*.json")).read_text())
    assert math.isfinite(metrics[family.metric])


BAD = {
    "depth": (
        ["model.backbone.depth=51"],
        r"model\.backbone\.depth: must be one of 18, 34, 50, 101, 152; got 51",
    ),
    "pattern file": (
        ["model.backbone.pattern=missing/k9.json"],
        r"model\.backbone\.pattern: no pattern file missing/k9\.json",
    ),
    "pattern of another architecture": (
        ["model.backbone.pattern=pattern_zoo/scattered_digits/ic_resnet18_k9.json"],
        r"model\.backbone\.pattern: .*ic_resnet18_k9\.json",
    ),
    "init file": (
        ["model.backbone.init_cfg.checkpoint=missing/r50.pth"],
        r"model\.backbone\.init_cfg.*missing/r50\.pth",
    ),
    "init keys": (
        ["model.backbone.init_cfg.checkpoint={other}"],
        r"model\.backbone\.init_cfg.*other\.pth: weights of another network: missing conv1\.weight",
    ),
    "annotations": (
        ["train_dataloader.dataset.ann_file=annotations/missing.json"],
        r"train_dataloader\.dataset\.ann_file: .*annotations/missing\.json",
    ),
    "type": (["model.neck.type=FPM"], r"model\.neck: FPM is not in the mmdet::model registry"),
    "option": (["model.rpn_head.strids=3"], r"model\.rpn_head: .*unexpected keyword argument 'strids'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_configs_are_one_line_that_names_the_key(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, expected = BAD[kind]
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.ones(1)}, other)
    family = Family("mmdet", "detection/faster-rcnn_ic-r50-k9_fpn_1x_coco.py", "")
    options = small(family, data) + [change.format(other=other) for change in changes]
    if kind.startswith("init"):
        options.remove("model.backbone.init_cfg=None")
    assert run("train", family.path, "--work-dir", tmp_path / "run", "--cfg-options", *options) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: {expected}.*", last), last


class Planted:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_checkpoints_that_are_more_than_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, checkpoint, work_dir = tmp_path / "trace", tmp_path / "odd.pth", tmp_path / "run"
    torch.save({"state_dict": {}, "planted": Planted(trace)}, checkpoint)
    family = FAMILIES["classifier"]
    end = ("--work-dir", work_dir, "--cfg-options", *small(family, data), "train_cfg.max_epochs=1")
    for arguments in (("test", family.path, checkpoint), ("train", family.path, "--resume", checkpoint)):
        assert run(*arguments, *end) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(
            f"error: load_from: {checkpoint}: not a file of weights that can be read safely"
        ), last
        assert not trace.exists()
    assert run("test", family.path, checkpoint, "--trust-checkpoint", *end) == 0
    assert trace.exists()


def test_missing_files_and_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FAMILIES["faster-rcnn"].path
    for arguments, words in (
        (("train", "missing.py"), "the config must be a file, got missing.py"),
        (("train", config, "--resume", "missing.pth"), "the checkpoint must be a file, got missing.pth"),
        (("test", config, "missing.pth"), "the checkpoint must be a file, got missing.pth"),
    ):
        assert run(*arguments, "--work-dir", tmp_path) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {words}"
    monkeypatch.setattr("mmengine.config.config.is_installed", lambda name: name != "mmdet")
    assert run("train", config) == 2
    assert re.search(r"mmdet is not installed.*ic-conv\[openmmlab\]", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("model = dict(type='ImageClassifier')", "mmpretrain"),
        ("model = dict(type='mmseg.EncoderDecoder')", "mmseg"),
        ("model = dict(type='FasterRCNN')", "mmdet"),
        ("model = dict(type='FasterRCNN')\ndefault_scope = 'mine'", "mine"),
        ("model = dict(type='BottomupPoseEstimator')", "mmpose"),
    ],
)
def test_scope_is_found_from_the_contents(text: str, scope: str, tmp_path: Path) -> None:
    pytest.importorskip(scope if scope != "mine" else "mmengine")
    config = tmp_path / "config.py"
    config.write_text(text)
    assert load_config(config).default_scope == scope


def test_unknown_model(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text("model = dict(type='Nobody')")
    with pytest.raises(ConfigError, match=r"config\.py: model\.type: no installed library .* knows 'Nobody'"):
        load_config(config)
