# SPDX-License-Identifier: Apache-2.0
"""COCO keypoints for bottom-up training and test, with errors that say what is missing where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS, METRICS
from mmpose.datasets.datasets import CocoDataset
from mmpose.evaluation.metrics import CocoMetric


@DATASETS.register_module()
class BottomupCocoDataset(CocoDataset):
    """MMPose's CocoDataset, one sample per image.

    Args: those of `mmpose.datasets.CocoDataset`; data_mode is ``bottomup``.

    Raises:
        FileNotFoundError: no annotation file, or no images beside it.
    """

    def __init__(self, ann_file: str = "", data_mode: str = "bottomup", **options: Any) -> None:
        super().__init__(ann_file, data_mode=data_mode, **options)

    def _load_annotations(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if not Path(self.ann_file).is_file():
            raise FileNotFoundError(f"annotation file {self.ann_file} is not there; {self._advice()}")
        instances, images = super()._load_annotations()
        if images and not Path(images[0]["img_path"]).is_file():
            raise FileNotFoundError(
                f"{self.ann_file} lists {Path(images[0]['img_path']).name}, which is not in the image folder "
                f"{self.data_prefix['img']}; {self._advice()}"
            )
        return instances, images

    def _advice(self) -> str:
        return (
            "COCO's images and annotations_trainval2017.zip (cocodataset.org) belong into "
            f"{self.data_root or 'the data_root of the config'}, or set dataset.data_root to where they are"
        )


@METRICS.register_module()
class BottomupCocoMetric(CocoMetric):
    """COCO keypoint AP of people whom the network scores itself.

    Without ann_file it takes the dataset's. Finding nobody, as early in a training, is AP 0 and no error.
    """

    def __init__(self, nms_mode: str = "none", score_mode: str = "bbox", **options: Any) -> None:
        super().__init__(nms_mode=nms_mode, score_mode=score_mode, **options)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        if self.format_only or any(len(prediction["keypoints"]) for prediction, _ in results):
            return super().compute_metrics(results)
        names = ("AP", "AP .5", "AP .75", "AP (M)", "AP (L)", "AR", "AR .5", "AR .75", "AR (M)", "AR (L)")
        return dict.fromkeys(names, 0.0)
