# SPDX-License-Identifier: Apache-2.0
"""A few generated images of coloured shapes with boxes, masks, semantic maps and class folders.

The files lie where the configs' data sets look for them, so that a test only changes `data_root`:

    coco/annotations/instances_{train,val}2017.json, coco/{train,val}2017/*.jpg
    cityscapes/leftImg8bit/{train,val}/*_leftImg8bit.png
    cityscapes/gtFine/{train,val}/*_gtFine_labelTrainIds.png
    imagenet/{train,val}/CLASS/*.jpg, imagenet/meta/{train,val}.txt
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SPLITS = ("train", "val")
SHAPES = ("square", "disc", "triangle")
CATEGORIES = {1: "person", 2: "bicycle", 3: "car"}  # names that COCO's own configs look for
COLORS = ((40, 40, 220), (40, 200, 40), (220, 80, 40))  # BGR, one for each shape
HEIGHT, WIDTH = 96, 128


def write_data(root: Path, images: int = 4, seed: int = 0) -> Path:
    """Writes the three data sets, `images` files in each split, and returns `root`."""
    rng = np.random.default_rng(seed)
    for split in SPLITS:
        _write_split(root, split, images, rng)
    return root


def _write_split(root: Path, split: str, images: int, rng: np.random.Generator) -> None:
    coco: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": key, "name": name} for key, name in CATEGORIES.items()],
    }
    labels = []
    for number in range(1, images + 1):
        image, semantic, polygons = _draw(rng)
        name = f"{number:012d}.jpg"
        _write(root / f"coco/{split}2017/{name}", image)
        _write(root / f"cityscapes/leftImg8bit/{split}/{number}_leftImg8bit.png", image)
        _write(root / f"cityscapes/gtFine/{split}/{number}_gtFine_labelTrainIds.png", semantic)
        coco["images"].append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for shape, polygon in polygons:
            x, y, w, h = cv2.boundingRect(polygon)
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": number,
                    "category_id": shape + 1,
                    "bbox": [x, y, w, h],
                    "area": float(cv2.contourArea(polygon)),
                    "segmentation": [polygon.flatten().tolist()],
                    "iscrowd": 0,
                }
            )
        shape = number % len(SHAPES)
        canvas = _noise(rng)
        cv2.fillPoly(canvas, [_polygon(shape, WIDTH // 2, HEIGHT // 2, 36)], COLORS[shape])
        name = f"{SHAPES[shape]}/{number}.jpg"
        _write(root / f"imagenet/{split}/{name}", canvas)
        labels.append(f"{name} {shape}\n")
    for name, text in (
        (f"coco/annotations/instances_{split}2017.json", json.dumps(coco)),
        (f"imagenet/meta/{split}.txt", "".join(labels)),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
    """An image with one shape in each half, its semantic map (0 background), and the shapes' polygons."""
    image, semantic, polygons = _noise(rng), np.zeros((HEIGHT, WIDTH), np.uint8), []
    for half in range(2):
        shape = int(rng.integers(len(SHAPES)))
        radius = int(rng.integers(18, 28))
        x = half * WIDTH // 2 + int(rng.integers(radius, WIDTH // 2 - radius + 1))
        polygon = _polygon(shape, x, int(rng.integers(radius, HEIGHT - radius)), radius)
        cv2.fillPoly(image, [polygon], COLORS[shape])
        cv2.fillPoly(semantic, [polygon], shape + 1)
        polygons.append((shape, polygon))
    return image, semantic, polygons


def _polygon(shape: int, x: int, y: int, radius: int) -> np.ndarray:
    """Corner points (P, 2) of a shape inside the circle round (x, y)."""
    corners = (4, 24, 3)[shape]
    angles = 2 * np.pi * (np.arange(corners) + 0.5) / corners
    offsets = radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.round(np.array([x, y]) + offsets).astype(np.int32)


def _noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(90, 160, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f"cannot write {path}")
