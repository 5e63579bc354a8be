# SPDX-License-Identifier: Apache-2.0
"""Tasks: losses and scores against hand-computed cases, and the choice of the task."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search.tasks import CenterHeatmap, Classification, Detections, average_precision, wrap
from search.tasks.classification import image_labels
from search.tasks.heatmap import find_peaks, focal_loss, heatmap_targets

Object = tuple[int, float, float, float]  # label, centre x and y, side
Peak = tuple[float, int, float, float]  # score, label, x, y


def score(peaks: list[list[Peak]], objects: list[list[Object]], canvas: int = 64) -> dict[str, float]:
    """average_precision of one image per inner list, one batch each."""
    predictions, labels, boxes = [], [], []
    for image_peaks, image_objects in zip(peaks, objects, strict=True):
        unused: list[Peak] = [(0.0, 0, 0, 0)] * (4 - len(image_peaks))
        table = torch.tensor([image_peaks + unused], dtype=torch.float64)
        predictions.append(Detections(table[..., 0], table[..., 1].long(), table[..., 2:]))
        rows = torch.tensor(image_objects, dtype=torch.float64).reshape(-1, 4)
        padded = torch.zeros(1, 5, 4, dtype=torch.float64)
        label = torch.full((1, 5), -1)
        label[0, : len(rows)] = rows[:, 0].long()
        half = rows[:, 3:] / 2
        padded[0, : len(rows)] = torch.cat((rows[:, 1:3] - half, rows[:, 1:3] + half), 1)
        labels.append(label)
        boxes.append(padded)
    return average_precision(predictions, labels, boxes, canvas)


NAN = math.nan
SMALL, LARGE = (3, 10.0, 10.0, 10.0), (3, 40.0, 40.0, 45.0)  # reach 3 px and 13.5 px


@pytest.mark.parametrize(
    ("peaks", "objects", "all_sizes", "small", "large"),
    [
        pytest.param([[(0.9, 3, 10, 10)]], [[SMALL]], 100, 100, NAN, id="hit"),
        pytest.param([[(0.9, 3, 12.9, 10)]], [[SMALL]], 100, 100, NAN, id="within-reach"),
        pytest.param([[(0.9, 3, 13.1, 10)]], [[SMALL]], 0, 0, NAN, id="out-of-reach"),
        pytest.param([[(0.9, 4, 10, 10)]], [[SMALL]], 0, 0, NAN, id="wrong-class"),
        pytest.param([[(0.0, 3, 10, 10)]], [[SMALL]], 0, 0, NAN, id="score-0-is-unused"),
        pytest.param([[]], [[SMALL]], 0, 0, NAN, id="nothing-found"),
        # precision 1/1, then 1/2: the second hit on one object is false
        pytest.param([[(0.9, 3, 10, 10), (0.8, 3, 11, 10)]], [[SMALL]], 100, 100, NAN, id="second-hit-later"),
        # false first: precision 0/1, 1/2, recall 1 at the second
        pytest.param([[(0.9, 3, 60, 5), (0.8, 3, 10, 10)]], [[SMALL]], 50, 50, NAN, id="false-first"),
        # another image's object is out of reach whatever its place
        pytest.param([[(0.9, 3, 10, 10)], []], [[], [SMALL]], 0, 0, NAN, id="other-image"),
        # hit, false, hit of 2 objects: (1 + 2/3) / 2
        pytest.param(
            [[(0.9, 3, 10, 10), (0.8, 3, 60, 5), (0.7, 3, 30, 50)]],
            [[SMALL, (3, 30.0, 50.0, 10.0)]],
            100 * (1 + 2 / 3) / 2,
            100 * (1 + 2 / 3) / 2,
            NAN,
            id="hit-false-hit",
        ),
        # the order is by score over all images: false 0.8 of image 0 stands before hit 0.7 of image 1
        pytest.param(
            [[(0.8, 3, 60, 5)], [(0.7, 3, 10, 10)]], [[], [SMALL]], 50, 50, NAN, id="rank-over-images"
        ),
        # precision 1/2 at recall 1/2, then 2/3 at recall 1: made falling, 2/3 counts for both
        pytest.param(
            [[(0.9, 3, 60, 5), (0.8, 3, 10, 10), (0.7, 3, 40, 40)]],
            [[SMALL, LARGE]],
            100 * 2 / 3,
            50,
            50,
            id="interpolated",
        ),
        # a hit on the large one does not count among the small ones, nor does its second hit
        pytest.param(
            [[(0.9, 3, 40, 40), (0.8, 3, 44, 40), (0.7, 3, 10, 10)]],
            [[SMALL, LARGE]],
            100 * (1 + 2 / 3) / 2,
            100,
            100,
            id="other-size-is-set-aside",
        ),
        # a wrong class on the large one spoils class 4 among the large, not among the small
        pytest.param(
            [[(0.9, 4, 40, 40), (0.8, 4, 10, 10)]],
            [[(4, 10.0, 10.0, 10.0), LARGE]],
            25,  # class 3: 0, class 4: 1/2
            100,
            0,
            id="wrong-class-on-other-size",
        ),
        # the first peak reaches both objects and takes the nearer, the second reaches the other alone
        pytest.param(
            [[(0.9, 3, 38, 40), (0.8, 3, 20, 40)]],
            [[(3, 30.0, 40.0, 44.0), LARGE]],
            100,
            NAN,
            100,
            id="nearest-first",
        ),
        # class 3 found, class 5 not: the mean is over classes
        pytest.param(
            [[(0.9, 3, 10, 10)]], [[SMALL, (5, 50.0, 50.0, 10.0)]], 50, 50, NAN, id="mean-over-classes"
        ),
    ],
)
def test_average_precision(
    peaks: list[list[Peak]], objects: list[list[Object]], all_sizes: float, small: float, large: float
) -> None:
    result = score(peaks, objects)
    assert result["mAP"] == pytest.approx(all_sizes)
    assert result["mAP_small"] == pytest.approx(small, nan_ok=True)
    assert result["mAP_large"] == pytest.approx(large, nan_ok=True)
    assert math.isnan(result["mAP_medium"])


def test_size_bins_scale_with_the_canvas() -> None:
    result = score([[(0.9, 3, 40, 40)]], [[(3, 40.0, 40.0, 45.0)]], canvas=128)  # 22.5 px of 64
    assert result["mAP_medium"] == pytest.approx(100)
    assert math.isnan(result["mAP_large"])


def test_heatmap_targets_match_a_loop() -> None:
    labels = torch.tensor([[1, 1, -1], [0, 2, 1]])
    boxes = torch.tensor(
        [
            [[0.0, 0, 40, 40], [16, 8, 48, 40], [0, 0, 0, 0]],
            [[0.0, 0, 8, 4], [20, 20, 60, 63], [40, 2, 63, 31]],
        ]
    )
    maps = heatmap_targets(labels, boxes, (2, 3, 16, 16))
    wanted = torch.zeros(2, 3, 16, 16)
    for image in range(2):
        for label, (x0, y0, x1, y1) in zip(labels[image].tolist(), boxes[image].tolist(), strict=True):
            if label < 0:
                continue
            sigma = max(0.1 * max(x1 - x0, y1 - y0) / 4, 0.5)
            column, row = int((x0 + x1) / 2 // 4), int((y0 + y1) / 2 // 4)
            for y in range(16):
                for x in range(16):
                    value = math.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * sigma**2))
                    wanted[image, label, y, x] = max(wanted[image, label, y, x].item(), value)
    torch.testing.assert_close(maps, wanted)
    assert (maps == 1).sum() == 5


def test_focal_loss_by_hand() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0]).reshape(1, 1, 1, 3)
    targets = torch.tensor([1.0, 0.6, 0.0]).reshape(1, 1, 1, 3)
    p = [1 / (1 + math.exp(-value)) for value in (0.3, -1.2, 2.0)]
    wanted = -(
        (1 - p[0]) ** 2 * math.log(p[0])
        + 0.4**4 * p[1] ** 2 * math.log(1 - p[1])
        + p[2] ** 2 * math.log(1 - p[2])
    )
    assert focal_loss(logits, targets).item() == pytest.approx(wanted, rel=1e-5)
    assert focal_loss(logits.tile(1, 1, 2, 1), targets.tile(1, 1, 2, 1)).item() == pytest.approx(
        wanted, rel=1e-5
    )


def test_peaks_of_target_maps_are_the_centres() -> None:
    labels = torch.tensor([[1, 0, 1]])
    boxes = torch.tensor([[[2.0, 2, 12, 12], [30, 30, 60, 50], [40, 2, 60, 22]]])
    found = find_peaks(torch.logit(heatmap_targets(labels, boxes, (1, 2, 16, 16)), eps=1e-6))
    best = sorted(zip(found.labels[0, :3].tolist(), found.centers[0, :3].tolist(), strict=True))
    assert best == [(0, [46.0, 42.0]), (1, [6.0, 6.0]), (1, [50.0, 14.0])]
    assert average_precision([found], [labels], [boxes])["mAP"] == 100
    assert found.scores[0, 3] < 0.5


@pytest.mark.parametrize(
    ("labels", "boxes", "wanted"),
    [
        (torch.tensor([4, 2]), None, [4, 2]),
        (
            torch.tensor([[7, 3, -1], [5, -1, -1]]),
            torch.tensor(
                [[[0.0, 0, 9, 9], [5, 5, 50, 30], [0, 0, 64, 64]], [[0, 0, 1, 1], *[[0, 0, 0, 0]] * 2]]
            ),
            [3, 5],
        ),
    ],
)
def test_image_labels(labels: Tensor, boxes: Tensor | None, wanted: list[int]) -> None:
    assert image_labels(labels, boxes).tolist() == wanted


def test_classification_score_and_loss() -> None:
    task = Classification(nn.Identity(), 3)
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    labels = torch.tensor([0, 1, 0])
    assert task.score([task.predictions(logits)], [{"labels": labels}]) == {
        "accuracy": pytest.approx(200 / 3)
    }
    wanted = -sum(row.log_softmax(0)[label].item() for row, label in zip(logits, labels, strict=True)) / 3
    assert task(logits, labels, mode="loss")["loss"].item() == pytest.approx(wanted)


class Returns(nn.Module):
    """Calls `make` on the batch."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        return self.make(self.norm(x))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: x[:, :, ::8, ::8], CenterHeatmap),
        (lambda x: (x[:, :, ::4, ::4], x[:, :2, ::32, ::32]), CenterHeatmap),
        (lambda x: [x], CenterHeatmap),
        (lambda x: x.flatten(1)[:, :10], Classification),
    ],
)
def test_wrap_finds_the_task(make: Any, kind: type) -> None:
    network = Returns(make)
    task = wrap(network, num_classes=10, image_size=40)
    assert type(task) is kind
    assert network.training
    assert not network.norm.num_batches_tracked
    shape = (2, 10, 10, 10) if kind is CenterHeatmap else (2, 10)
    assert task(torch.randn(2, 3, 40, 40)).shape == shape


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.flatten(1)[:, :9], "a logit per class: 10 classes, 9 logits"),
        (lambda x: x.mean(), r"got a tensor \(\)"),
        (lambda x: {"a": x}, "got dict"),
        (lambda x: (), r"got \[\]"),
        (lambda x: (x, x.mean((2, 3))), r"got \[a tensor \(1, 3, 64, 64\), a tensor \(1, 3\)\]"),
        (lambda x: x @ torch.zeros(3, 3), r"must take images \(1, 3, 64, 64\)"),
    ],
)
def test_wrap_refuses(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrap(Returns(make), num_classes=10)


def test_heatmap_refuses_data_without_boxes() -> None:
    task = wrap(Returns(lambda x: x), 10)
    with pytest.raises(ValueError, match="class folders have no boxes"):
        task(torch.zeros(1, 3, 64, 64), torch.tensor([1]), mode="loss")
