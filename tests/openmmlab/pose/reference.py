# SPDX-License-Identifier: Apache-2.0
"""Targets and losses of associative embedding, computed in NumPy from the definition, one joint at a time."""

from __future__ import annotations

import math

import numpy as np


def targets(
    keypoints: np.ndarray, visible: np.ndarray, size: tuple[int, int], sigma: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Heatmaps (K, H, W) and indices (N, K, 2) for heatmaps of (width, height) at a quarter of the input."""
    width, height = size
    people, joints = visible.shape
    heatmaps, indices = np.zeros((joints, height, width)), np.zeros((people, joints, 2), dtype=int)
    for n in range(people):
        for k in range(joints):
            if visible[n, k] <= 0.5:
                continue
            # four input pixels make one heatmap pixel: the middle of pixels 0 to 3 is 1.5
            x, y = (keypoints[n, k] - 1.5) / 4
            for row in range(height):
                for column in range(width):
                    if abs(column - x) <= 3 * sigma and abs(row - y) <= 3 * sigma:
                        value = math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2))
                        heatmaps[k, row, column] = max(heatmaps[k, row, column], value)
            column, row = math.floor(x + 0.5), math.floor(y + 0.5)
            if 0 <= column < width and 0 <= row < height:
                indices[n, k] = row * width + column, 1
    return heatmaps, indices


def tag_losses(tags: np.ndarray, indices: list[np.ndarray]) -> tuple[float, float]:
    """Pull and push loss of tag maps (B, L*K, H, W), summed over the images."""
    pull = push = 0.0
    for maps, people in zip(tags, indices, strict=True):
        joints = people.shape[1]
        flat = maps.reshape(-1, joints, maps.shape[-1] * maps.shape[-2])
        persons = []
        for person in people:
            values = [flat[:, k, place] for k, (place, visible) in enumerate(person) if visible]
            if values:
                persons.append(np.stack(values))
        if not persons:
            continue
        means = [values.mean(0) for values in persons]
        pull += np.mean([np.mean((v - m) ** 2) for v, m in zip(persons, means, strict=True)])
        pairs = [(a, b) for i, a in enumerate(means) for j, b in enumerate(means) if i != j]
        if pairs:
            push += 0.5 * np.mean([np.sum(np.exp(-((a - b) ** 2))) for a, b in pairs])
    return pull, push


def heatmap_loss(predicted: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Squared error of (B, K, H, W) where the mask (B, 1, H, W) is 1, as a mean over all pixels."""
    return float(np.mean((predicted - target) ** 2 * mask))
