# SPDX-License-Identifier: Apache-2.0
"""Detection without boxes: one heat map per class whose peaks are the objects' centres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search.tasks.base import Batch, Task
from search.tasks.detection import Detections, average_precision

STRIDE = 4  # px per cell of the heat map
_WIDTH = 64  # channels that the levels share
_PEAKS = 32  # most peaks per image
_PRIOR = -2.19  # logit of 0.1: the maps start low, as most cells hold no object


class CenterHeatmap(Task):
    """Centre heat maps (after CenterNet, Zhou et al., Objects as Points) on any feature network.

    Every level passes a 1x1 conv to 64 channels and is upsampled to stride 4; their sum passes a ReLU
    and a 1x1 conv to the classes. The loss is CenterNet's penalty-reduced focal loss; the Gaussian round
    a centre has a tenth of the object's longest side as its sigma, at least half a cell.

    Legend: N images, C classes, M most objects per image, h = ceil(H / 4), w = ceil(W / 4).

    Args:
        network: returns one feature map or a sequence of them, (N, channels[i], ., .) each.
        num_classes: number of classes, C.
        channels: channels of each level.
        image_size: side of the images in px; only the size bins of the score scale with it.

    Shape:
        inputs (N, 3, H, W), labels (N, M) with -1 in unused rows, boxes (N, M, 4) in px;
        heat maps (N, C, h, w), as logits.

    Example:
        >>> task = CenterHeatmap(torch.nn.Conv2d(3, 8, 3, stride=8, padding=1), 10, channels=(8,))
        >>> task(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10, 16, 16])
    """

    def __init__(
        self, network: nn.Module, num_classes: int, channels: Sequence[int], image_size: int = 64
    ) -> None:
        super().__init__(network, num_classes)
        self.image_size = image_size
        self.laterals = nn.ModuleList(nn.Conv2d(width, _WIDTH, 1) for width in channels)
        self.classify = nn.Conv2d(_WIDTH, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.constant_(self.classify.bias, _PRIOR)  # type: ignore[arg-type]

    def outputs(self, inputs: Tensor) -> Tensor:
        maps = self.network(inputs)
        maps = (maps,) if isinstance(maps, Tensor) else maps
        size = [-(-side // STRIDE) for side in inputs.shape[-2:]]
        merged = [
            F.interpolate(lateral(level), size, mode="bilinear")
            for lateral, level in zip(self.laterals, maps, strict=True)
        ]
        return self.classify(F.relu(torch.stack(merged).sum(0)))

    def loss(self, outputs: Tensor, labels: Tensor | None, boxes: Tensor | None) -> Tensor:
        if labels is None or boxes is None:
            raise ValueError("heat maps need labels (N, M) and boxes (N, M, 4); class folders have no boxes")
        return focal_loss(outputs.float(), heatmap_targets(labels, boxes, outputs.shape))

    def predictions(self, outputs: Tensor) -> Detections:
        return find_peaks(outputs.float())

    def score(self, predictions: Sequence[Any], batches: Sequence[Batch]) -> dict[str, float]:
        """`mAP`, `mAP_small`, `mAP_medium`, `mAP_large`, in percent."""
        labels, boxes = zip(*((batch["labels"], batch["boxes"]) for batch in batches), strict=True)
        return average_precision(predictions, labels, boxes, self.image_size)


def heatmap_targets(labels: Tensor, boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Gaussians (N, C, h, w) with exactly 1 in the cell of each object's centre."""
    n, classes, rows, columns = shape
    sigma = ((boxes[..., 2:] - boxes[..., :2]).amax(-1) * (0.1 / STRIDE)).clamp_min(0.5)  # (N, M), cells
    center = ((boxes[..., :2] + boxes[..., 2:]) / (2 * STRIDE)).floor()  # (N, M, 2), cells
    x = torch.arange(columns, device=boxes.device) - center[..., :1]  # (N, M, w)
    y = torch.arange(rows, device=boxes.device) - center[..., 1:]
    gauss = torch.exp(-(y[..., :, None] ** 2 + x[..., None, :] ** 2) / (2 * sigma[..., None, None] ** 2))
    gauss = gauss * (labels >= 0)[..., None, None]
    index = labels.clamp_min(0)[..., None, None].expand_as(gauss)
    return gauss.new_zeros(n, classes, rows, columns).scatter_reduce(1, index, gauss, "amax")


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """CenterNet's focal loss (alpha 2, beta 4), divided by the number of centres."""
    probability = logits.sigmoid()
    centers = targets == 1
    hit = (1 - probability) ** 2 * F.logsigmoid(logits)
    miss = (1 - targets) ** 4 * probability**2 * F.logsigmoid(-logits)
    return -torch.where(centers, hit, miss).sum() / centers.sum().clamp_min(1)


def find_peaks(logits: Tensor) -> Detections:
    """The best 32 cells per image that no neighbour among the eight exceeds."""
    scores = logits.sigmoid()
    rows, columns = scores.shape[-2:]
    scores = scores * (F.max_pool2d(scores, 3, stride=1, padding=1) == scores)
    best, place = scores.flatten(1).topk(min(_PEAKS, scores[0].numel()))
    cell = place % (rows * columns)
    centers = torch.stack((cell % columns, cell // columns), -1) * STRIDE + STRIDE / 2
    return Detections(best, place // (rows * columns), centers)
