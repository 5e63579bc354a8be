# SPDX-License-Identifier: Apache-2.0
"""Targets equal the definition, and decoding finds again what was encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmpose")

from mmpose.evaluation.metrics import CocoMetric

from ic_conv.openmmlab.pose import BottomupCocoDataset, TrainableAssociativeEmbedding
from tests.openmmlab.pose import reference

SIZE = (96, 64)  # of the input: width, height
CELLS = (24, 16)
FLIPS = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


def codec(size: tuple[int, int] = SIZE, **options: Any) -> TrainableAssociativeEmbedding:
    return TrainableAssociativeEmbedding(size, (size[0] // 4, size[1] // 4), **options)


def people(count: int, seed: int = 0, low: float = -20, high: float = 110) -> tuple[np.ndarray, np.ndarray]:
    """Random joints, some outside the image, some not annotated."""
    rng = np.random.default_rng(seed)
    return rng.uniform(low, high, (count, 17, 2)), (rng.random((count, 17)) > 0.3).astype(np.float32)


def apart(count: int = 3) -> np.ndarray:
    """People whose equal joints are far apart, all of them inside the image."""
    rng = np.random.default_rng(1)
    left = 14 + 34 * np.arange(count)[:, None, None] * [1, 0]
    return left + rng.uniform(-8, 8, (count, 17, 2)) + [0, 30]


def tag_maps(indices: np.ndarray, cells: tuple[int, int] = CELLS) -> torch.Tensor:
    """Maps with tag 3n at the joints of person n and around them."""
    width, height = cells
    columns = np.arange(width * height) % width
    near = np.abs(indices[..., 0, None] % width - columns).argmin(0) if len(indices) else np.zeros((17, 1))
    return torch.tensor(3.0 * near, dtype=torch.float32).expand(17, width * height).reshape(17, height, width)


@pytest.mark.parametrize(
    ("keypoints", "visible"),
    [
        pytest.param(*people(0), id="nobody"),
        pytest.param(*people(1), id="one person"),
        pytest.param(*people(6), id="overlapping people"),
        pytest.param(people(3)[0], np.zeros((3, 17)), id="nothing annotated"),
        pytest.param(*people(2, low=200, high=300), id="all outside"),
        pytest.param(np.full((1, 17, 2), 93.6), np.ones((1, 17)), id="at the border"),
    ],
)
def test_targets_equal_the_definition(keypoints: np.ndarray, visible: np.ndarray) -> None:
    encoded = codec().encode(keypoints, visible)
    heatmaps, indices = reference.targets(keypoints, visible, CELLS)
    np.testing.assert_allclose(encoded["heatmaps"], heatmaps, atol=1e-5)
    np.testing.assert_array_equal(encoded["keypoint_indices"], indices)
    np.testing.assert_array_equal(encoded["keypoint_weights"], indices[..., 1])


def test_heatmaps_of_a_flipped_image_are_the_flipped_heatmaps() -> None:
    keypoints, visible = people(4)
    flipped = keypoints[:, FLIPS] * [-1, 1] + [SIZE[0] - 1, 0]
    maps = codec().encode(keypoints, visible)["heatmaps"]
    np.testing.assert_allclose(
        codec().encode(flipped, visible[:, FLIPS])["heatmaps"], maps[FLIPS, :, ::-1], atol=1e-5
    )


@pytest.mark.parametrize("zoom", [1, 4], ids=["as they are", "resized to the input"])
def test_decoding_finds_joints_between_the_pixels(zoom: int) -> None:
    keypoints = apart()
    encoded = codec().encode(keypoints)
    heatmaps = torch.tensor(encoded["heatmaps"])[None]
    tags = tag_maps(encoded["keypoint_indices"])[None]
    if zoom > 1:
        heatmaps = torch.nn.functional.interpolate(heatmaps, scale_factor=zoom, mode="bilinear")
        tags = torch.nn.functional.interpolate(tags, scale_factor=zoom, mode="nearest")
    (found,), (scores,), _ = codec().batch_decode(heatmaps, tags, 4 / zoom)
    found = found[np.argsort(found[:, :, 0].mean(1))]
    assert found.shape == keypoints.shape
    assert np.abs(found - keypoints).max() < (0.05 if zoom == 1 else 0.6)
    assert (scores > 0.8).all()


def test_the_best_people_come_first_and_stay() -> None:
    heights = np.repeat([[0.5], [0.9], [0.7]], 17, axis=1)
    heights[:, 0] = [0.9, 0.5, 0.7]  # noses are found first, in another order
    encoded = [
        codec().encode(person[None])["heatmaps"] * h[:, None, None]
        for person, h in zip(apart(), heights, strict=True)
    ]
    tags = tag_maps(codec().encode(apart())["keypoint_indices"])[None]
    maps = torch.tensor(np.max(encoded, axis=0))[None]
    _, _, (scores,) = codec().batch_decode(maps, tags)
    np.testing.assert_allclose(scores, [0.9, 0.7, 0.5], atol=0.06)
    (kept,), _, (scores,) = codec(decode_max_instances=2).batch_decode(maps, tags)
    assert len(kept) == 2 and scores.min() > 0.6


def test_a_missing_joint_is_looked_for_where_the_tag_is_the_persons() -> None:
    keypoints = apart(2)
    encoded = codec().encode(keypoints)
    maps = torch.tensor(encoded["heatmaps"])[None].clone()
    x, y = (keypoints[1, 16] // 4).astype(int)
    maps[0, 16, y - 6 : y + 7, max(x - 6, 0) :] *= 0.05  # below the threshold, still the best of that person
    (found,), (scores,), _ = codec().batch_decode(maps, tag_maps(encoded["keypoint_indices"])[None])
    right = found[:, :, 0].mean(1).argmax()
    assert np.abs(found[right, 16] - keypoints[1, 16]).max() < 4
    assert 0 < scores[right, 16] < 0.1


def test_empty_maps_hold_nobody() -> None:
    found, scores, people_scores = codec().batch_decode(
        torch.zeros(2, 17, 16, 24), torch.zeros(2, 17, 16, 24)
    )
    assert [f.shape for f in found] == [(0, 17, 2)] * 2
    assert [s.shape for s in scores] == [(0, 17)] * 2 and [p.shape for p in people_scores] == [(0,)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heatmap_size": (48, 64)}, r"input_size / 4 = \(64.0, 64.0\), got \(48, 64\)"),
        ({"heatmap_size": (256, 256)}, "must be input_size / 4"),
        ({"heatmap_size": (64, 64), "use_udp": True}, "use_udp"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainableAssociativeEmbedding(input_size=(256, 256), **options)


@pytest.mark.parametrize(("size", "mode"), [(256, "expand"), (384, "expand"), (256, "fit"), (384, "fit")])
def test_decoded_targets_score_full_marks_on_real_images(shared_data: Path, size: int, mode: str) -> None:
    root = shared_data / "coco_mini"
    resize = {
        "type": "mmpose.BottomupResize",
        "input_size": (size, size),
        "size_factor": 64,
        "resize_mode": mode,
    }
    images = BottomupCocoDataset(
        ann_file=str(root / "test_coco.json"),
        data_prefix={"img": str(root)},
        test_mode=True,
        pipeline=[{"type": "mmpose.LoadImage"}, resize],
    )
    metric = CocoMetric(str(root / "test_coco.json"), nms_mode="none", score_mode="bbox")
    metric.dataset_meta = images.metainfo
    for image in images:
        shape = np.array(image["input_size"])
        zoom = shape / image["input_scale"]
        keypoints = image["keypoints"] * zoom + shape / 2 - zoom * image["input_center"]
        both = codec(tuple(shape.tolist()))
        encoded = both.encode(keypoints, image["keypoints_visible"])
        tags = _nearest_person(keypoints, image["keypoints_visible"], (shape // 4).tolist())
        (found,), (scores,), (people_scores,) = both.batch_decode(
            torch.tensor(encoded["heatmaps"])[None], tags[None]
        )
        predicted = {
            "keypoints": (found - shape / 2) / zoom + image["input_center"],
            "keypoint_scores": scores,
            "bbox_scores": people_scores,
        }
        metric.process(
            [],
            [{"id": image["id"], "img_id": image["img_id"], "gt_instances": {}, "pred_instances": predicted}],
        )
    assert metric.evaluate(len(images))["coco/AP"] > 0.99


def _nearest_person(keypoints: np.ndarray, visible: np.ndarray, cells: list[int]) -> torch.Tensor:
    columns, rows = np.meshgrid(np.arange(cells[0]), np.arange(cells[1]))
    places = (np.stack([columns, rows], -1) + 0.5) * 4
    distance = np.linalg.norm(places - keypoints[:, :, None, None], axis=-1)
    distance[visible < 0.5] = np.inf
    return torch.tensor(3.0 * distance.argmin(0), dtype=torch.float32)
