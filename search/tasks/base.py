# SPDX-License-Identifier: Apache-2.0
"""What every task offers: losses to the training, predictions and a score to the evaluation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import BaseModel
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class Task(BaseModel):
    """A network with what is needed to train and score it; MMEngine's Runner trains it.

    A batch is a dict with `inputs` (N, 3, H, W), `labels` (N,) or (N, M), and for detection `boxes`
    (N, M, 4), as the data sets of `search.data` give it.

    Args:
        network: any module that takes (N, 3, H, W).
        num_classes: number of classes.
    """

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes

    def init_weights(self) -> None:
        """Leaves the weights alone: the Runner calls this, and they may be trained already."""

    def forward(
        self, inputs: Tensor, labels: Tensor | None = None, boxes: Tensor | None = None, mode: str = "tensor"
    ) -> Any:
        """MMEngine's entry: mode "tensor" gives raw outputs, "loss" a dict, "predict" predictions."""
        outputs = self.outputs(inputs)
        if mode == "loss":
            return {"loss": self.loss(outputs, labels, boxes)}
        return self.predictions(outputs) if mode == "predict" else outputs

    @abstractmethod
    def outputs(self, inputs: Tensor) -> Tensor:
        """Logits of a batch of images."""

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor | None, boxes: Tensor | None) -> Tensor:
        """Scalar loss of the logits."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> Any:
        """What `score` needs of the logits."""

    @abstractmethod
    def score(self, predictions: Sequence[Any], batches: Sequence[Batch]) -> dict[str, float]:
        """Figures in percent over all batches; `batches` may lack the inputs."""
