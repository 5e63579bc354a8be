# SPDX-License-Identifier: Apache-2.0
"""Every config builds, training copes with whatever images hold, and the whole way ends in skeletons."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

pytest.importorskip("mmpose")
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, init_default_scope

from ic_conv.openmmlab.runner import load_config
from tests.openmmlab.commands import command

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs/human_pose").glob("*.py"))
MULTISCALE = [path for path in CONFIGS if "multiscale" in path.stem]
SINGLE = [path for path in CONFIGS if path not in MULTISCALE]


def small_config(name: str, data: Path, folder: Path, side: int = 64, **options: Any) -> Path:
    """A config of configs/human_pose made small, as a file."""
    config = load_config(ROOT / f"configs/human_pose/{name}.py")
    sizes = {"input_size": (side, side), "heatmap_size": (side // 4, side // 4)}
    config.model.head.decoder.update(sizes)
    config.model.head.update(deconv_out_channels=(16, 16, 16))
    config.train_dataloader.update(batch_size=2)
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = config[key].dataset
        dataset.data_root = str(data)
        dataset.pipeline[1].input_size = (side, side)
    config.train_dataloader.dataset.pipeline[3].encoder.update(sizes)
    config.train_cfg = {"by_epoch": False, "max_iters": 4, "val_interval": 100}
    config.default_hooks.logger.interval = 1
    # MMEngine keeps loggers and visualizers by name in global tables
    config.experiment_name = config.visualizer.name = f"run-{uuid.uuid4().hex}"
    config.merge_from_dict(options)
    path = folder / f"{name}.py"
    config.dump(path)
    return path


def losses(work_dir: Path) -> list[dict[str, float]]:
    lines = next(work_dir.glob("*/vis_data/scalars.json")).read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("path", SINGLE, ids=[path.stem for path in SINGLE])
def test_configs_build_a_network_whose_heatmaps_are_a_quarter_of_the_image(path: Path) -> None:
    config = load_config(path)
    backbone = config.model.backbone
    if backbone.get("pattern") and not (ROOT / backbone.pattern).is_file():
        pytest.skip(f"{backbone.pattern} is not there yet")
    init_default_scope("mmpose")
    model = MODELS.build(config.model | {"backbone": backbone | {"init_cfg": None}}).eval()
    with torch.no_grad():
        heatmaps, tags = model.head(model.extract_feat(torch.zeros(1, 3, 64, 64)))
    assert heatmaps.shape == tags.shape == (1, 17, 16, 16)


@pytest.mark.parametrize("path", MULTISCALE, ids=[path.stem for path in MULTISCALE])
def test_multiscale_configs_differ_in_the_test_alone(path: Path) -> None:
    config, single = load_config(path), load_config(str(path).replace("_multiscale", ""))
    assert config.train_dataloader == single.train_dataloader
    assert config.model.backbone == single.model.backbone and config.model.test_cfg.multiscale_test
    transforms = [TRANSFORMS.build(step) for step in config.test_dataloader.dataset.pipeline[1:]]
    assert transforms[0].pyramid == [2, 0.5]


def bad_annotations(kind: str, data: Path) -> None:
    """Changes the training annotations of a copy of the drawn people."""
    file = data / "annotations/person_keypoints_train2017.json"
    content = json.loads(file.read_text())
    if kind == "one person":
        content["annotations"] = content["annotations"][-1:]
    if kind == "nobody annotated":
        for annotation in content["annotations"]:
            annotation.update(keypoints=[0] * 51, num_keypoints=0)
    if kind == "images without people":
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] > 4]
    file.write_text(json.dumps(content))


@pytest.fixture
def copied(drawn: Path, tmp_path: Path) -> Path:
    for name in ("annotations", "train2017", "val2017"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in (drawn / name).iterdir():
            (tmp_path / "data" / name / file.name).write_bytes(file.read_bytes())
    return tmp_path / "data"


@pytest.mark.parametrize(
    "kind", ["one person", "nobody annotated", "images without people", "joints outside the crop"]
)
def test_training_goes_on_with(kind: str, copied: Path, tmp_path: Path) -> None:
    bad_annotations(kind, copied)
    far = {"train_dataloader.dataset.pipeline.1.shift_factor": 9.0} if "crop" in kind else {}
    path = small_config("res18_drawn_256x256", copied, tmp_path, **far)
    assert command("train")(path, "--work-dir", tmp_path / "run") == 0
    steps = losses(tmp_path / "run")
    assert len(steps) == 4
    assert all(math.isfinite(step[key]) for step in steps for key in ("loss_kpt", "loss_pull", "loss_push"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.head.decoder.heatmap_size": (32, 32)}, "heatmap_size must be input_size / 4"),
        (
            {"train_dataloader.dataset.ann_file": "annotations/none.json"},
            "annotations/none.json is not there",
        ),
        (
            {"model.backbone.type": "ICResNet", "model.backbone.depth": 50},
            "ic_resnet18_k9.json",
        ),
    ],
    ids=["heatmap size", "annotation file", "pattern for another depth"],
)
def test_mistakes_are_one_line_before_the_first_step(
    options: dict[str, Any], message: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_config("ic_res18_k9_drawn_256x256", drawn, tmp_path, **options)
    assert command("train")(path, "--work-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_networks_answer_alike_in_training_and_evaluation() -> None:
    config = load_config(ROOT / "configs/human_pose/res18_drawn_256x256.py")
    init_default_scope("mmpose")
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    images = torch.randn(4, 3, 128, 128)
    with torch.no_grad():
        trained = model.train().head(model.extract_feat(images))
        evaluated = model.eval().head(model.extract_feat(images))
    for train_map, eval_map in zip(trained, evaluated, strict=True):
        assert ((train_map - eval_map).abs().mean() / train_map.std()).item() < 0.05
    # running variances start at 1: much smaller ones would be found too slowly
    assert min(norm.running_var.mean().item() for norm in norms) > 0.01


@pytest.mark.slow
def test_a_whole_step_of_the_flagship_on_a_cpu(drawn: Path, tmp_path: Path) -> None:
    options = {
        "train_dataloader.dataset.data_root": f"{drawn}/",
        "train_dataloader.dataset.indices": 1,
        "train_dataloader.batch_size": 1,
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        "model.backbone.init_cfg": None,
        "train_cfg.max_epochs": 1,
        "default_hooks.checkpoint": None,
        "default_hooks.logger.interval": 1,
        **dict.fromkeys(("val_dataloader", "val_cfg", "val_evaluator")),
    }
    config = ROOT / "configs/human_pose/ic_res50_k13_coco_640x640.py"
    train = [sys.executable, ROOT / "tools/train.py", config, "--work-dir", tmp_path, "--cfg-options"]
    settings = [f"{key}={value}" for key, value in options.items()]
    subprocess.run([*train, *settings], check=True, capture_output=True)
    (step,) = losses(tmp_path)
    assert all(math.isfinite(step[key]) for key in ("loss_kpt", "loss_pull", "loss_push"))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"one image of 640x640, forward, backward and Adam: {peak:.2f} GiB at most")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("multiscale", [False, True])
def test_whole_models_are_tested_with_flips_and_scales(
    flip: bool, multiscale: bool, drawn: Path, tmp_path: Path
) -> None:
    config = Config.fromfile(small_config("res18_drawn_256x256", drawn, tmp_path))
    config.model.test_cfg.update(flip_test=flip, multiscale_test=multiscale, restore_heatmap_size=multiscale)
    dataset = config.test_dataloader.dataset
    if multiscale:
        dataset.pipeline[1] = {"type": "BottomupPyramid", "input_size": (64, 64), "resize_mode": "expand"}
    init_default_scope("mmpose")
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    model.head.decoder.decode_keypoint_thr = -1.0  # an untrained network is sure of nothing
    with torch.no_grad():
        (result,) = model.test_step(pseudo_collate([DATASETS.build(dataset)[0]]))
    scores = result.pred_instances.bbox_scores
    assert result.pred_instances.keypoints.shape[1:] == (17, 2) and 0 < len(scores) <= 30
    assert (scores[:-1] >= scores[1:]).all()


@pytest.mark.slow
def test_from_supernet_to_skeletons(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    supernet = small_config(
        "super_res18_k9_drawn_256x256", drawn, tmp_path, **{"model.backbone.kernel_size": 5}
    )
    assert command("train")(supernet, "--work-dir", tmp_path / "super") == 0
    pattern = tmp_path / "found.json"
    checkpoint = ["--checkpoint", tmp_path / "super/iter_4.pth", "--calibration-images", 4]
    assert command("search")("--config", supernet, *checkpoint, "--output", pattern) == 0
    assert len(json.loads(pattern.read_text())) == 16

    network = small_config(
        "ic_res18_k9_drawn_256x256", drawn, tmp_path, **{"model.backbone.pattern": str(pattern)}
    )
    assert command("train")(network, "--work-dir", tmp_path / "net") == 0
    trained = tmp_path / "net/iter_4.pth"
    assert command("test")(network, trained, "--work-dir", tmp_path / "test") == 0
    metrics = json.loads(next((tmp_path / "test").glob("*/*.json")).read_text())
    assert 0 <= metrics["coco/AP"] <= 1

    images = sorted((drawn / "val2017").iterdir())
    options = [
        "--config",
        network,
        "--checkpoint",
        trained,
        "--out-dir",
        tmp_path / "people",
        "--score-thr",
        0,
    ]
    assert command("infer_pose")(*options, *images) == 0
    results = json.loads((tmp_path / "people/people.json").read_text())
    assert all(len(person["keypoints"]) == 51 and person["image_id"] in (1, 2) for person in results)
    for image in images:
        drawing = cv2.imread(str(tmp_path / f"people/{image.stem}.png"))
        assert drawing.shape == cv2.imread(str(image)).shape
