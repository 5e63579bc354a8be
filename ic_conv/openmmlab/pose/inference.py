# SPDX-License-Identifier: Apache-2.0
"""People in pictures of one's own: from a trained model to skeletons and COCO-format results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmpose.apis import inference_bottomup, init_model
from mmpose.structures import PoseDataSample
from mmpose.visualization import PoseLocalVisualizer

from ic_conv._files import atomic_path
from ic_conv.openmmlab._loading import only_weights


class _Visualizer(PoseLocalVisualizer):
    """Gives the radius as the number that NumPy 2.4 insists on."""

    def draw_circles(self, center: Any, radius: Any, *args: Any, **options: Any) -> Any:
        return super().draw_circles(center, float(np.ravel(radius)[0]), *args, **options)


class PoseEstimator:
    """A trained model of a config.

    Args:
        config: with a bottom-up model and a test pipeline.
        checkpoint: weights of the whole model.
        device: where it runs.
        trust_checkpoint: read the checkpoint as a pickle, which may run any code that its author put in.

    Raises:
        ValueError: the checkpoint holds more than weights, and is not trusted.

    Example:
        >>> estimator = PoseEstimator(Config.fromfile(CONFIG), "epoch_300.pth")
        >>> estimator.results(estimator.find_people("me.jpg"), image_id=1)[0]["score"]
    """

    def __init__(
        self,
        config: Config,
        checkpoint: str | os.PathLike[str],
        device: str = "cpu",
        trust_checkpoint: bool = False,
    ) -> None:
        with only_weights(str(checkpoint), trust_checkpoint):
            self.model = init_model(config, str(checkpoint), device)
        self.visualizer = _Visualizer(line_width=2, radius=3)
        self.visualizer.set_dataset_meta(self.model.dataset_meta)

    def find_people(self, image: str | os.PathLike[str]) -> PoseDataSample:
        """The people of one picture, the most certain first.

        Raises:
            ValueError: the file is no picture.
        """
        return inference_bottomup(self.model, _read(image))[0]

    @staticmethod
    def results(sample: PoseDataSample, image_id: int, score_thr: float = 0.0) -> list[dict[str, Any]]:
        """The people in COCO's result format; a joint is x, y in pixels of the picture, and its score."""
        found = sample.pred_instances
        return [
            {
                "image_id": image_id,
                "category_id": 1,
                "keypoints": np.column_stack([places, scores]).round(3).ravel().tolist(),
                "score": round(float(score), 4),
            }
            for places, scores, score in zip(
                found.keypoints, found.keypoint_scores, found.bbox_scores, strict=True
            )
            if score >= score_thr
        ]

    def draw(
        self,
        image: str | os.PathLike[str],
        sample: PoseDataSample,
        out: Path,
        score_thr: float = 0.0,
        joint_thr: float = 0.1,
    ) -> None:
        """Writes the picture with the skeletons of people above `score_thr`, joints above `joint_thr`."""
        picture = cv2.cvtColor(_read(image), cv2.COLOR_BGR2RGB)
        shown = sample.clone()
        shown.pred_instances = sample.pred_instances[sample.pred_instances.bbox_scores >= score_thr]
        with atomic_path(out) as path:
            self.visualizer.add_datasample(
                "people", picture, shown, draw_gt=False, kpt_thr=joint_thr, out_file=str(path)
            )


def _read(image: str | os.PathLike[str]) -> np.ndarray:
    picture = cv2.imread(str(image))
    if picture is None:
        raise ValueError(f"not a picture that can be read: {image}")
    return picture
