# SPDX-License-Identifier: Apache-2.0
"""Every config builds, runs one forward pass, and says what was published."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet.registry")
pytest.importorskip("mmseg.registry")
pytest.importorskip("mmpretrain.registry")
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from ic_conv.openmmlab.runner import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = ("classification", "detection", "instance_segmentation", "segmentation")
NAMES = sorted(
    str(path.relative_to(CONFIGS)) for folder in FOLDERS for path in (CONFIGS / folder).glob("*.py")
)
SAMPLES = {"mmdet": "DetDataSample", "mmseg": "SegDataSample", "mmpretrain": "DataSample"}
SIDE = 64


@pytest.mark.parametrize("name", NAMES)
def test_builds_and_predicts(name: str) -> None:
    config = load_config(CONFIGS / name)
    scope = config.default_scope
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model).eval()
        sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), (SIDE, SIDE))
        sample = getattr(importlib.import_module(f"{scope}.structures"), SAMPLES[scope])
        image = torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)
        data = {"inputs": [image], "data_samples": [sample(metainfo={**sizes, "scale_factor": (1.0, 1.0)})]}
        with torch.no_grad():
            (result,) = model.test_step(data)
    values = {"mmpretrain": lambda: result.pred_score, "mmseg": lambda: result.seg_logits.data}
    scores = values.get(scope, lambda: result.pred_instances.scores)()
    assert torch.isfinite(scores).all()
    if scope == "mmseg":
        assert result.pred_sem_seg.data.shape[-2:] == (SIDE, SIDE)
    if name.startswith("instance"):
        assert len(result.pred_instances.masks) == len(scores)


def published_schedule(config: Config) -> dict[str, Any]:
    """Peak learning rate, warm-up (iterations, or epochs of a classifier), clipping and length."""
    warmup = config.param_scheduler[0]
    return {
        "lr": config.optim_wrapper.optimizer.lr,
        "warmup": warmup.end if warmup.type == "LinearLR" else 0,
        "clip": (config.optim_wrapper.get("clip_grad") or {}).get("max_norm"),
        "length": config.train_cfg.get("max_epochs") or config.train_cfg.max_iters,
    }


@pytest.mark.parametrize("name", NAMES)
def test_schedule_is_the_published_one(name: str) -> None:
    if name.startswith("classification"):
        expected = {"lr": 0.8, "warmup": 5, "clip": None, "length": 130}
    elif name.startswith("segmentation"):
        expected = {"lr": 0.01, "warmup": 0, "clip": None, "length": 80000}
    else:
        retina = "retinanet" in name
        involution_neck = "fpn-inv" in name or "fpn-cvol" in name
        expected = {
            "lr": 0.01 if retina else 0.02,
            "warmup": 2000 if involution_neck or retina else 500,
            "clip": 40 if retina and involution_neck else 5 if "head-inv" in name else None,
            "length": 12,
        }
    assert published_schedule(load_config(CONFIGS / name)) == expected


def test_classification_recipe() -> None:
    config = load_config(CONFIGS / "classification/rednet50_32xb64-130e_in1k.py")
    published = {"type": "SGD", "lr": 0.8, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    assert published.items() <= dict(config.optim_wrapper.optimizer).items()
    assert config.train_dataloader.batch_size * 32 == config.auto_scale_lr.base_batch_size == 2048
    cosine = config.param_scheduler[1]
    assert (cosine.type, cosine.begin, cosine.end) == ("CosineAnnealingLR", 5, 130)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_lines(name: str) -> None:
    lines = (CONFIGS / name).read_text().splitlines()
    assert len(lines) <= 25 and any(line.startswith("_base_ = ") for line in lines)
