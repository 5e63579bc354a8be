# SPDX-License-Identifier: Apache-2.0
"""Gaussians on heatmaps: drawing them, and finding their centres again."""

from __future__ import annotations

import numpy as np


def gaussian_maps(
    points: np.ndarray, annotated: np.ndarray, shape: tuple[int, int], sigma: float
) -> np.ndarray:
    """One heatmap per joint, with a Gaussian of height 1 on each person, the largest where they overlap.

    Dimension letters: N people, K joints, H, W size of the heatmaps.

    Args:
        points: centres (x, y) in heatmap pixels, (N, K, 2); they need not be whole numbers.
        annotated: joints to draw, (N, K).
        shape: (H, W).
        sigma: in heatmap pixels; the Gaussians end at 3 sigma in x and in y.

    Shape:
        returns (K, H, W), float32.
    """
    axes = [np.arange(size) - points[..., axis, None] for axis, size in ((1, shape[0]), (0, shape[1]))]
    rows, columns = (
        np.where(np.abs(d) <= 3 * sigma, np.exp(-(d**2) / (2 * sigma**2)), 0).astype(np.float32) for d in axes
    )
    rows = rows * annotated[..., None].astype(np.float32)
    maps = np.zeros((points.shape[1], *shape), dtype=np.float32)
    for row, column in zip(rows, columns, strict=True):
        np.maximum(maps, row[:, :, None] * column[:, None, :], out=maps)
    return maps


def refine_peaks(cells: np.ndarray, heatmaps: np.ndarray, reach: int = 1) -> np.ndarray:
    """The peak between the pixels: the top of a parabola through the logarithms, exact for a Gaussian.

    Args:
        cells: whole-number peaks (x, y), (N, K, 2).
        heatmaps: (K, H, W).
        reach: distance of the two neighbours in pixels: larger for maps that were resized up.

    Shape:
        returns (N, K, 2), float32; moved by at most reach / 2, and not at all at the border or off a peak.
    """
    height, width = heatmaps.shape[1:]
    joint = np.arange(cells.shape[1])
    x, y = cells[..., 0], cells[..., 1]
    refined = cells.astype(np.float32)
    for axis, (size, place, step) in enumerate(((width, x, (reach, 0)), (height, y, (0, reach)))):
        inner = (place >= reach) & (place < size - reach)
        before, middle, after = (
            np.log(
                np.maximum(
                    heatmaps[
                        joint, np.clip(y + s * step[1], 0, height - 1), np.clip(x + s * step[0], 0, width - 1)
                    ],
                    1e-6,
                )
            )
            for s in (-1, 0, 1)
        )
        bend = before - 2 * middle + after
        move = reach * 0.5 * (before - after) / np.where(bend < 0, bend, -np.inf)
        refined[..., axis] += np.where(inner, np.clip(move, -reach / 2, reach / 2), 0)
    return refined


def fill_missing(
    cells: np.ndarray, scores: np.ndarray, heatmaps: np.ndarray, tags: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places for the joints that a person lacks: the best response where the tag is nearest to the person's.

    Dimension letters: N people, K joints, L tag values per joint, H, W size of the heatmaps.

    Args:
        cells: whole-number places (x, y), (N, K, 2).
        scores: (N, K), 0 for a missing joint.
        heatmaps: (K, H, W).
        tags: (L*K, H, W).

    Shape:
        returns cells (N, K, 2) and scores (N, K), new arrays.
    """
    cells, scores = cells.copy(), scores.copy()
    joints, height, width = heatmaps.shape
    maps = tags.reshape(-1, joints, height, width)
    for cell, score in zip(cells, scores, strict=True):
        found, missing = np.flatnonzero(score > 0), np.flatnonzero(score <= 0)
        if not missing.size:
            continue
        mean = maps[:, found, cell[found, 1], cell[found, 0]].mean(1)
        distance = np.linalg.norm(maps[:, missing] - mean[:, None, None, None], axis=0)
        best = (np.round(distance) * 100 - heatmaps[missing]).reshape(len(missing), -1).argmin(1)
        cell[missing] = np.stack([best % width, best // width], axis=-1)
        score[missing] = heatmaps[missing, best // width, best % width]
    return cells, scores
