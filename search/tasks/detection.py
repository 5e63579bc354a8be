# SPDX-License-Identifier: Apache-2.0
"""Average precision of centre detections, over all objects and by object size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

# Longest side of an object in px on a 64 px canvas: from, to.
SIZE_BINS: Mapping[str, tuple[float, float]] = {
    "": (0, np.inf),
    "_small": (0, 20),
    "_medium": (20, 40),
    "_large": (40, np.inf),
}
RADIUS = 0.3  # a detection may lie this share of the object's longest side from its centre


@dataclass(frozen=True)
class Detections:
    """Peaks of a batch, best first.

    Legend: N images, K peaks per image.

    Args:
        scores: (N, K), 0..1; 0 marks an unused row.
        labels: (N, K) int64.
        centers: (N, K, 2), x and y in px.
    """

    scores: Tensor
    labels: Tensor
    centers: Tensor


def average_precision(
    predictions: Sequence[Detections], labels: Sequence[Tensor], boxes: Sequence[Tensor], canvas: int = 64
) -> dict[str, float]:
    """Mean over classes of the average precision (area under the interpolated curve), in percent.

    Detections of a class, best first, each take the nearest free object of that class and image whose
    centre lies within 0.3 times its longest side. For a size bin, as in COCO, objects of other sizes are
    set aside: a false detection (second hit, wrong class) within reach of objects of other sizes alone
    counts neither way; within reach of nothing it has no size and is false in every bin. Classes without
    an object in the bin are left out of its mean; a bin without any object is nan.

    Args:
        predictions: one per batch.
        labels: per batch (N, M), -1 in unused rows.
        boxes: per batch (N, M, 4), x0 y0 x1 y1 in px.
        canvas: side of the images in px; the bins' limits (20 and 40 px) are for 64.

    Returns:
        mAP, mAP_small, mAP_medium, mAP_large.
    """
    scores, found, centers = (
        np.concatenate([getattr(part, name).cpu().numpy() for part in predictions])
        for name in ("scores", "labels", "centers")
    )
    wanted = np.concatenate([part.cpu().numpy() for part in labels])
    corners = np.concatenate([part.cpu().numpy() for part in boxes]) * (64 / canvas)
    middles = (corners[..., :2] + corners[..., 2:]) / 2
    sizes = (corners[..., 2:] - corners[..., :2]).max(-1)
    gaps = np.linalg.norm(centers[:, :, None] * (64 / canvas) - middles[:, None], axis=-1)  # (N, K, M)
    reach = (gaps <= RADIUS * sizes[:, None]) & (wanted >= 0)[:, None]
    same = found[:, :, None] == wanted[:, None]
    ranked = np.argsort(-scores, axis=None, kind="stable")
    ranked = ranked[scores.ravel()[ranked] > 0]
    result = {}
    for name, (low, high) in SIZE_BINS.items():
        inside = (wanted >= 0) & (sizes >= low) & (sizes < high)
        outcome = _match(ranked, reach, same, gaps, inside)
        classes = found.ravel()[ranked]
        values = [
            _area(outcome[(classes == label) & (outcome >= 0)], total)
            for label, total in zip(*np.unique(wanted[inside], return_counts=True), strict=True)
        ]
        result[f"mAP{name}"] = 100 * float(np.mean(values)) if values else float("nan")
    return result


def _match(
    ranked: np.ndarray, reach: np.ndarray, same: np.ndarray, gaps: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """For each ranked detection 1 (takes an object of the bin), 0 (false) or -1 (does not count)."""
    free = inside.copy()
    outcome = np.zeros(len(ranked), np.int8)
    for place, flat in enumerate(ranked):
        image, peak = divmod(int(flat), reach.shape[1])
        near = reach[image, peak]
        if not near.any():
            continue
        candidates = np.flatnonzero(near & same[image, peak] & free[image])
        if len(candidates):
            free[image, candidates[gaps[image, peak, candidates].argmin()]] = False
            outcome[place] = 1
        elif not inside[image, near].any():
            outcome[place] = -1
    return outcome


def _area(hits: np.ndarray, total: int) -> float:
    """Area under the precision-recall curve, precision made falling, for hits (1) in ranked order."""
    if not len(hits):
        return 0.0
    positives = np.cumsum(hits, dtype=np.int64)
    precision = positives / np.arange(1, len(hits) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(falling[hits == 1].sum() / total)
