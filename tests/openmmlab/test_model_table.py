# SPDX-License-Identifier: Apache-2.0
"""Measured parameters and FLOPs, and the tables of configs/README.md that hold them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet.registry")
pytest.importorskip("mmseg.registry")
pytest.importorskip("mmpretrain.registry")
pytest.importorskip("mmpose.registry")
from ic_conv import complexity
from ic_conv.models.rednet import BLOCKS
from ic_conv.models.resnet import Bottleneck, ResNet
from ic_conv.openmmlab.model_table import measure, update
from ic_conv.openmmlab.runner import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
README = CONFIGS / "README.md"


def test_the_readme_is_what_a_fresh_run_measures() -> None:
    text = README.read_text()
    fresh, problems = update(text, CONFIGS)
    assert problems == []
    assert fresh == text
    rows = [line for line in text.splitlines() if line.startswith("|") and ".py" in line]
    assert len(rows) >= 48 and all(re.search(r"\| [\d.]+ \| [\d.]+( \([\d.]+\))? \|$", row) for row in rows)


def test_every_config_stands_in_the_tables() -> None:
    text = README.read_text()
    files = {"human_pose": "*_640x640.py"}  # the others are for a CPU, or for the test alone
    for folder in ("classification", "detection", "instance_segmentation", "segmentation", "human_pose"):
        for path in (CONFIGS / folder).glob(files.get(folder, "*.py")):
            assert f"({folder}/{path.name})" in text or path.name.startswith("supernet"), path


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        ("r50-k9", "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"),
        ("r101-k9", "mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py"),
        ("x101-32x4d-k9", "mmdet::faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py"),
    ],
)
def test_ic_rows_equal_the_library_s_own_plain_network(ours: str, plain: str, tmp_path: Path) -> None:
    config = tmp_path / "plain.py"
    config.write_text(f'_base_ = "{plain}"\n')
    ic = load_config(CONFIGS / f"detection/faster-rcnn_ic-{ours}_fpn_1x_coco.py")
    assert ic.model.backbone.pattern
    assert measure(ic) == measure(load_config(config))


@pytest.mark.parametrize(
    ("blocks", "text"), [("rednet26", "13.70 M and 2.36"), ("rednet38", "19.63 M and 3.24")]
)
def test_resnets_of_no_library(blocks: str, text: str) -> None:
    cost = complexity.count(ResNet(Bottleneck, BLOCKS[blocks]))
    assert f"{cost.params / 1e6:.2f} M and {cost.flops / 1e9:.2f}" == text
    assert text.replace(" and ", ", ") in README.read_text()


TABLE = """| config | params (M) | FLOPs (G) | our params (M) | our FLOPs (G) |
|---|---|---|---|---|
| [RedNet-26](classification/rednet26_32xb64-130e_in1k.py){note} | {params} | {flops} | | |
"""


@pytest.mark.parametrize(
    ("params", "flops", "note", "problem"),
    [
        ("9.23", "1.73", "", None),
        ("9.13", "1.73", "", "params (M) must be within 0.5% of 9.13; got 9.23"),
        ("9.23", "1.65", "", "FLOPs (G) must be within 2.0% of 1.65; got 1.73"),
        ("9.13", "1.65", " [a]", None),
        ("", "", "", None),
    ],
)
def test_rows_are_checked(params: str, flops: str, note: str, problem: str | None) -> None:
    text = TABLE.format(params=params, flops=flops, note=note)
    filled, problems = update(text, CONFIGS)
    assert filled.endswith(f"| {params} | {flops} | 9.23 | 1.73 |\n")
    assert [entry.partition(": ")[2] for entry in problems] == ([problem] if problem else [])
    assert update(text, CONFIGS, lambda config: False) == (text, [])
