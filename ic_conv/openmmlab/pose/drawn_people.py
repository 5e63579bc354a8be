# SPDX-License-Identifier: Apache-2.0
"""Writes pictures of drawn people in COCO's keypoint format, to train on where COCO is not at hand.

    python -m ic_conv.openmmlab.pose.drawn_people data/drawn_people

Each picture has two to six people of 36 to 216 pixels before clutter. One person in eight has no annotated
keypoints; the first picture of each split also has a crowd region.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ic_conv._files import atomic_path, write_text

WIDTH, HEIGHT = 320, 240
SIZES = (36, 216)  # pixels from head to foot when standing: 1:6
JOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)
SKELETON = (
    (15, 13),
    (13, 11),
    (16, 14),
    (14, 12),
    (5, 7),
    (7, 9),
    (6, 8),
    (8, 10),
    (11, 12),
    (5, 6),
    (5, 11),
    (6, 12),
)
LIMBS = np.array([[220, 120, 40], [40, 60, 220]])  # BGR: one side bluish, the other reddish


def write_people(
    root: str | Path, images: dict[str, int], seed: int = 0, people: tuple[int, int] = (2, 6)
) -> Path:
    """Writes images and annotations where COCO has them, and returns `root`.

    Args:
        root: a folder, made if missing; gets ``train2017/``, ``annotations/person_keypoints_train2017.json``
            and the same for the other splits.
        images: number of images of each split, ``{"train": 200, "val": 50}``.
        seed: of everything drawn.
        people: least and largest number of people in a picture.
    """
    root = Path(root)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(images.items()):
        rng = np.random.default_rng([seed, number])
        folder = root / f"{split}2017"
        folder.mkdir(exist_ok=True)
        skeleton = [[a + 1, b + 1] for a, b in SKELETON]
        category = {"id": 1, "name": "person", "keypoints": JOINTS, "skeleton": skeleton}
        coco: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [category]}
        for image_id in range(1, count + 1):
            picture, annotations = _draw_picture(rng, people, crowd=image_id == 1)
            name = f"{image_id:012d}.jpg"
            with atomic_path(folder / name) as path:
                cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
            coco["images"].append({"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT})
            for annotation in annotations:
                key = {"id": len(coco["annotations"]) + 1, "image_id": image_id, "category_id": 1}
                coco["annotations"].append({**key, **annotation})
        write_text(root / "annotations" / f"person_keypoints_{split}2017.json", json.dumps(coco))
    return root


def _draw_picture(
    rng: np.random.Generator, people: tuple[int, int], crowd: bool
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    picture = np.ascontiguousarray(
        cv2.resize(
            rng.integers(60, 200, (6, 8, 3), dtype=np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC
        )
    )
    for _ in range(12):  # clutter that looks like limbs
        ends = rng.integers(0, (WIDTH, HEIGHT), (2, 2))
        ends[1] = ends[0] + (ends[1] - ends[0]) // 4
        _line(picture, ends, rng.integers(0, 256, 3), int(rng.integers(1, 8)))
    annotations = []
    if crowd:
        before = picture.copy()
        for _ in range(8):
            _draw_person(picture, _pose(rng, 30.0) + rng.uniform((20, 20), (100, 60)), 30.0, rng)
        annotations.append(_annotate(cv2.dilate(_changed(before, picture), np.ones((9, 9))), None))
    for _ in range(rng.integers(people[0], people[1] + 1)):
        size = float(np.exp(rng.uniform(*np.log(SIZES))))
        joints = _pose(rng, size) + rng.uniform((0.1 * WIDTH, 0.3 * HEIGHT), (0.9 * WIDTH, 0.7 * HEIGHT))
        before = picture.copy()
        _draw_person(picture, joints, size, rng)
        annotations.append(
            _annotate(_changed(before, picture), joints if rng.random() > 0.125 else np.full_like(joints, -1))
        )
    noise = rng.normal(0, 6, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8), annotations


def _changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The mask of the pixels that were drawn over."""
    return (before != after).any(-1).astype(np.uint8)


def _pose(rng: np.random.Generator, size: float) -> np.ndarray:
    """The 17 joints (x, y) of a person seen from the front, around the hips."""
    lean = rng.normal(0, 0.2)

    def step(angle: float, length: float) -> np.ndarray:  # from straight down, towards the image's right
        return size * length * np.array([np.sin(angle + lean), np.cos(angle + lean)])

    neck = step(np.pi, 0.3)
    nose = neck + step(np.pi, 0.12)
    joints = {"nose": nose}
    for side, sign in (("left", 1), ("right", -1)):  # a person's left is the image's right
        joints[f"{side}_eye"] = nose + step(np.pi - sign * 0.8, 0.035)
        joints[f"{side}_ear"] = nose + step(np.pi / 2 * sign, 0.05)
        shoulder = neck + step(np.pi / 2 * sign, 0.1)
        angle = sign * rng.uniform(-0.2, 2.4)
        elbow = shoulder + step(angle, 0.17)
        joints[f"{side}_shoulder"], joints[f"{side}_elbow"] = shoulder, elbow
        joints[f"{side}_wrist"] = elbow + step(angle + sign * rng.uniform(-0.4, 1.4), 0.16)
        hip = step(np.pi / 2 * sign, 0.07)
        angle = sign * rng.uniform(-0.1, 0.8)
        knee = hip + step(angle, 0.25)
        joints[f"{side}_hip"], joints[f"{side}_knee"] = hip, knee
        joints[f"{side}_ankle"] = knee + step(angle - sign * rng.uniform(-0.1, 0.7), 0.24)
    return np.stack([joints[name] for name in JOINTS])


def _draw_person(picture: np.ndarray, joints: np.ndarray, size: float, rng: np.random.Generator) -> None:
    limbs = rng.permutation(LIMBS)  # colours must not tell left from right: a flipped picture swaps them
    shirt, skin = rng.integers(0, 256, 3), np.array([150, 190, 235]) - rng.integers(0, 100)
    cv2.fillPoly(picture, [np.rint(joints[[5, 6, 12, 11]]).astype(np.int32)], shirt.tolist())
    for first, second in SKELETON[:8]:
        _line(picture, joints[[first, second]], limbs[first % 2], max(1, round(size / 16)))
    for joint, radius, color in ((0, 0.065, skin), (1, 0.0125, limbs[1]), (2, 0.0125, limbs[0])):
        centre = np.rint(joints[joint]).astype(int).tolist()
        cv2.circle(picture, centre, max(1, round(size * radius)), color.tolist(), -1)


def _line(picture: np.ndarray, ends: np.ndarray, color: np.ndarray, width: int) -> None:
    first, second = np.rint(ends).astype(int).tolist()
    cv2.line(picture, first, second, color.tolist(), width, cv2.LINE_AA)


def _annotate(mask: np.ndarray, joints: np.ndarray | None) -> dict[str, Any]:
    """The annotation of one person, or of a crowd, which has run lengths for a mask and no joints."""
    points = np.full((len(JOINTS), 2), -1.0) if joints is None else joints
    inside = np.all((points >= 0) & (points < (WIDTH, HEIGHT)), axis=1)[:, None]
    keypoints = np.column_stack([points, np.full(len(JOINTS), 2)]) * inside
    segmentation: Any
    if joints is None:
        flat = np.concatenate([[0], mask.T.ravel()])  # run lengths begin with a run of zeros
        edges = np.flatnonzero(np.diff(flat))
        counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
        segmentation = {"size": [HEIGHT, WIDTH], "counts": counts.tolist()}
    else:
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        segmentation = [outline.ravel().tolist() for outline in outlines if len(outline) > 2]
    return {
        "keypoints": keypoints.round(2).ravel().tolist(),
        "num_keypoints": int(inside.sum()),
        "bbox": list(cv2.boundingRect(mask)),
        "area": float(mask.sum()),
        "iscrowd": int(joints is None),
        "segmentation": segmentation,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write; made if missing")
    parser.add_argument("--train", type=int, default=200, metavar="N", help="training images (default 200)")
    parser.add_argument("--val", type=int, default=50, metavar="N", help="test images (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default 0)")
    args = parser.parse_args(argv)
    try:
        write_people(args.folder, {"train": args.train, "val": args.val}, args.seed)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.train} and {args.val} images with annotations in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
