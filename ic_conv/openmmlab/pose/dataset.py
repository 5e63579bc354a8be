# SPDX-License-Identifier: Apache-2.0
"""COCO keypoints for bottom-up training and test, with errors that say what is missing where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS
from mmpose.datasets.datasets import CocoDataset


@DATASETS.register_module()
class BottomupCocoDataset(CocoDataset):
    """MMPose's CocoDataset, one sample per image.

    Args: those of `mmpose.datasets.CocoDataset`; data_mode is ``bottomup``.

    Raises:
        FileNotFoundError: no annotation file, or no images beside it.
    """

    def __init__(self, ann_file: str = "", data_mode: str = "bottomup", **options: Any) -> None:
        super().__init__(ann_file, data_mode=data_mode, **options)

    @classmethod
    def _load_metainfo(cls, metainfo: dict[str, Any] | None = None) -> dict[str, Any]:
        """Arrays as int64 and float64: checkpoints hold them, and no others are among what loads safely."""
        wide = {"u": np.int64, "i": np.int64, "f": np.float64}
        loaded = super()._load_metainfo(metainfo)
        return {
            key: value.astype(wide[value.dtype.kind]) if isinstance(value, np.ndarray) else value
            for key, value in loaded.items()
        }

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
