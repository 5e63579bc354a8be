# SPDX-License-Identifier: Apache-2.0
"""The test sees the pixels that the training saw; masks and pyramids fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmpose")
from mmengine.dataset import pseudo_collate
from mmpose.datasets.transforms import BottomupRandomAffine, BottomupResize, GenerateTarget

from ic_conv.openmmlab.pose import (
    BottomupCocoDataset,
    BottomupPyramid,
    PackBottomupInputs,
    PyramidPreprocessor,
    UnannotatedMask,
)

CODEC = {"type": "TrainableAssociativeEmbedding", "input_size": (128, 128), "heatmap_size": (32, 32)}
STILL = {"shift_prob": 0, "scale_prob": 0, "rotate_prob": 0}


def picture(height: int = 75, width: int = 100) -> dict[str, Any]:
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8), (width, height))
    return {"img": image, "img_shape": (height, width), "ori_shape": (height, width)}


@pytest.mark.parametrize(("scale_type", "mode"), [("long", "fit"), ("short", "expand")])
@pytest.mark.parametrize("shape", [(75, 100), (100, 75), (64, 64)])
def test_training_and_test_see_the_same_pixels(scale_type: str, mode: str, shape: tuple[int, int]) -> None:
    train = BottomupRandomAffine((128, 128), scale_type=scale_type, **STILL)(picture(*shape))
    test = BottomupResize((128, 128), size_factor=64, resize_mode=mode)(picture(*shape))
    top, left = ((side - 128) // 2 for side in test["img"].shape[:2])
    seen = test["img"][top : top + 128, left : left + 128]
    assert top == left == 0 or mode == "expand"
    np.testing.assert_array_equal(train["img"], seen)


def unannotated() -> dict[str, Any]:
    """An image with a person as a polygon and a crowd as run lengths, neither with joints."""
    crowd = np.zeros((75, 100), dtype=int)
    crowd[5:25, 10:40] = 1
    runs = np.diff(np.flatnonzero(np.diff(crowd.T.ravel(), prepend=-1, append=-1)))
    polygon = [50, 40, 90, 40, 90, 70, 50, 70]
    return picture() | {"invalid_segs": [[polygon], {"size": [75, 100], "counts": runs.tolist()}, None, []]}


@pytest.mark.parametrize("flip", [False, True])
def test_people_without_joints_are_masked_and_nothing_else(flip: bool) -> None:
    results = BottomupRandomAffine((128, 128), scale_type="long", **STILL)(unannotated())
    results |= {"heatmaps": np.zeros((17, 32, 32)), "flip": flip, "flip_direction": "horizontal"}
    mask = UnannotatedMask()(results)["heatmap_mask"]
    assert mask.shape == (1, 32, 32) and mask.dtype == bool
    expected = np.ones((32, 32), dtype=bool)
    # 100 pixels become 32 cells; the image's 75 rows lie in cells 4 to 28
    expected[4 + round(5 * 0.32) : 4 + round(25 * 0.32), round(10 * 0.32) : round(40 * 0.32)] = False
    expected[4 + round(40 * 0.32) : 4 + round(70 * 0.32), round(50 * 0.32) : round(90 * 0.32)] = False
    wrong = mask[0] != (expected[:, ::-1] if flip else expected)
    assert wrong.sum() < 60  # cells at the outlines
    assert not cv2.erode(wrong.astype(np.uint8), np.ones((3, 3))).any()
    assert mask[0, :3].all() and mask[0, 29:].all()  # the padding holds nobody


def test_scales_of_a_pyramid_show_the_same_field_of_view() -> None:
    results = BottomupPyramid((128, 128), resize_mode="expand")(picture())
    sizes = [image.shape[:2] for image in results["img"]]
    assert sizes == [(128, 192), (256, 384), (64, 96)]
    original = results["img"][0].astype(float)
    for image in results["img"][1:]:
        small = cv2.resize(
            image, (192, 128), interpolation=cv2.INTER_AREA if len(image) > 128 else cv2.INTER_LINEAR
        )
        inner = np.abs(small - original)[10:-10, 20:-20]
        assert inner.mean() < 3  # a shift by one pixel makes 6


def test_a_pyramid_is_packed_normalised_and_kept_in_order() -> None:
    results = BottomupPyramid((64, 64), resize_mode="fit")(picture()) | {"id": [1], "img_id": 1}
    packed = PackBottomupInputs()(results)
    preprocess = PyramidPreprocessor(mean=[10.0] * 3, std=[2.0] * 3, bgr_to_rgb=True)
    data = preprocess(pseudo_collate([packed]))
    assert [tuple(level.shape) for level in data["inputs"]] == [
        (1, 3, 64, 64),
        (1, 3, 128, 128),
        (1, 3, 32, 32),
    ]
    expected = (torch.tensor(results["img"][0]).permute(2, 0, 1)[[2, 1, 0]].float() - 10) / 2
    torch.testing.assert_close(data["inputs"][0][0], expected)
    assert data["data_samples"][0].batch_input_shape == (64, 64)
    assert data["data_samples"][0].aug_scales == [2.0, 0.5]


def test_scales_whose_sides_do_not_fit_the_network_are_named() -> None:
    with pytest.raises(ValueError, match=r"multiple of 32, got 64, 0.25"):
        BottomupPyramid((128, 128), aug_scales=(2, 0.25))


def test_what_the_head_needs_reaches_it(drawn: Path) -> None:
    data = BottomupCocoDataset(
        "annotations/person_keypoints_train2017.json",
        data_root=str(drawn),
        data_prefix={"img": "train2017"},
        pipeline=[
            {"type": "mmpose.LoadImage"},
            BottomupRandomAffine((128, 128)),
            GenerateTarget(CODEC),
            UnannotatedMask(),
            PackBottomupInputs(),
        ],
    )
    crowded = data[0]["data_samples"]
    assert crowded.gt_instance_labels.keypoint_indices.shape[1:] == (17, 2)
    assert crowded.gt_fields.heatmaps.shape == (17, 32, 32)
    masks = [data[i]["data_samples"].gt_fields.heatmap_mask for i in range(len(data))]
    assert masks[0].shape == (1, 32, 32) and not torch.stack(masks).all()


@pytest.mark.parametrize(
    ("file", "folder", "message"),
    [
        ("annotations/nothing.json", "train2017", "nothing.json is not there; COCO's images and annotations"),
        ("annotations/person_keypoints_train2017.json", "elsewhere", "not in the image folder .*elsewhere"),
    ],
)
def test_missing_files_are_named(drawn: Path, file: str, folder: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        BottomupCocoDataset(file, data_root=str(drawn), data_prefix={"img": folder})
