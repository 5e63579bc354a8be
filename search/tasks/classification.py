# SPDX-License-Identifier: Apache-2.0
"""Classification of the image, or of its largest object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from search.tasks.base import Batch, Task


class Classification(Task):
    """Cross entropy on a network that returns logits.

    Legend: N images, C classes, M most objects per image.

    Shape:
        network output: (N, C) with C >= num_classes. labels: (N,), or (N, M) with boxes (N, M, 4) and
        -1 in unused rows; then the object with the largest box counts.

    Example:
        >>> Classification(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)), 10)
    """

    def outputs(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def loss(self, outputs: Tensor, labels: Tensor | None, boxes: Tensor | None) -> Tensor:
        return F.cross_entropy(outputs.float(), image_labels(labels, boxes))

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    def score(self, predictions: Sequence[Tensor], batches: Sequence[Batch]) -> dict[str, float]:
        """`accuracy`, in percent."""
        wanted = torch.cat([image_labels(batch.get("labels"), batch.get("boxes")) for batch in batches])
        return {"accuracy": 100 * (torch.cat(list(predictions)) == wanted).double().mean().item()}


def image_labels(labels: Tensor | None, boxes: Tensor | None) -> Tensor:
    """One label (N,) per image: its own, or that of its largest object."""
    if labels is None or (labels.ndim == 2) != (boxes is not None):
        raise ValueError("classification needs labels (N,), or labels (N, M) with boxes (N, M, 4)")
    if boxes is None:
        return labels
    sides = boxes[..., 2:] - boxes[..., :2]
    areas = sides.prod(-1).masked_fill(labels < 0, -1)
    return labels.gather(1, areas.argmax(1, keepdim=True))[:, 0]
