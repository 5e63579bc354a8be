# SPDX-License-Identifier: Apache-2.0
"""Which joints belong to one person: candidates matched by their tags."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment


def group_by_tags(
    scores: np.ndarray,
    tags: np.ndarray,
    places: np.ndarray,
    keypoint_order: Sequence[int],
    score_thr: float = 0.1,
    tag_thr: float = 1.0,
) -> np.ndarray:
    """People from joint candidates, joint by joint, each joint matched optimally to the people so far.

    Dimension letters: K joints, M candidates per joint, L tag values per candidate, G people.

    Args:
        scores: heatmap values, (K, M).
        tags: (K, M, L).
        places: coordinates (x, y), (K, M, 2).
        keypoint_order: joints in the order of matching, from those that are found best to the limbs.
        score_thr: candidates at or below it are ignored.
        tag_thr: a candidate at least this far from a person's mean tag starts a person of its own.

    Shape:
        returns (G, K, 3): x, y, score, zeros for a joint that a person lacks; people in order of discovery.

    Source: Newell et al., Associative Embedding, NIPS 2017, section 3.3; the cost (tag distance rounded to
    whole numbers first, then score) is that of the authors' code and of MMPose.

    Example:
        >>> places = np.array([[[3, 4], [9, 9]], [[3, 8], [9, 5]]])
        >>> tags = np.array([[[0.1], [5.0]], [[0.2], [5.1]]])
        >>> group_by_tags(np.ones((2, 2)), tags, places, [0, 1]).shape
        (2, 2, 3)
    """
    joints = np.concatenate([places, scores[..., None]], axis=-1).astype(np.float32)
    people = np.zeros((0, len(scores), 3), dtype=np.float32)
    tag_sums, tag_counts = np.zeros((0, tags.shape[-1])), np.zeros((0, 1))
    for k in keypoint_order:
        found = np.flatnonzero(scores[k] > score_thr)
        owners = _match(scores[k, found], tags[k, found], tag_sums / tag_counts, tag_thr)
        new = np.flatnonzero(owners < 0)
        owners[new] = len(people) + np.arange(len(new))
        people, tag_sums, tag_counts = (
            np.concatenate([old, np.zeros((len(new), *old.shape[1:]), old.dtype)])
            for old in (people, tag_sums, tag_counts)
        )
        people[owners, k] = joints[k, found]
        tag_sums[owners] += tags[k, found]
        tag_counts[owners] += 1
    return people


def matching_cost(distances: np.ndarray, scores: np.ndarray, tag_thr: float) -> np.ndarray:
    """The cost of giving a candidate (rows) to a person (columns).

    Rounding leaves many matchings equally cheap; of these the last term takes one with most joints near their
    person, where MMPose's choice is arbitrary.
    """
    return np.round(distances) * 100 - scores[:, None] + 1e-3 * np.minimum(distances / tag_thr, 1)


def _match(scores: np.ndarray, tags: np.ndarray, means: np.ndarray, tag_thr: float) -> np.ndarray:
    """The person of each candidate by index into the people's mean tags, -1 for a new person."""
    distances = np.linalg.norm(tags[:, None] - means[None], axis=-1)
    rows, columns = linear_sum_assignment(matching_cost(distances, scores, tag_thr))
    near = distances[rows, columns] < tag_thr
    owners = np.full(len(scores), -1)
    owners[rows[near]] = columns[near]
    return owners
