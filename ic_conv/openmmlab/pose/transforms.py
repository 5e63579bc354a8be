# SPDX-License-Identifier: Apache-2.0
"""The pieces of a bottom-up data pipeline that MMPose lacks or that do not fit its test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
from mmengine.registry import TRANSFORMS
from mmpose.datasets.transforms import BottomupGetHeatmapMask, BottomupResize, PackPoseInputs
from mmpose.datasets.transforms.formatting import image_to_tensor

META_KEYS = (
    "id",
    "img_id",
    "img_path",
    "crowd_index",
    "ori_shape",
    "img_shape",
    "input_size",
    "input_center",
    "input_scale",
    "aug_scales",
    "flip",
    "flip_direction",
    "flip_indices",
    "raw_ann_info",
    "skeleton_links",
)
SMALLEST_STRIDE = 32  # input sides are multiples of it: the stride of the backbone's last stage


@TRANSFORMS.register_module()
class UnannotatedMask(BottomupGetHeatmapMask):
    """Adds heatmap_mask (1, H, W): False where people are whose joints are not annotated.

    MMPose's transform keeps crowd regions in the loss, as it skips run-length masks, and takes the padding
    out of it, where the test then finds joints that no training ever ruled out.
    """

    def __init__(self) -> None:
        super().__init__(get_invalid=True)

    def _segs_to_mask(self, segs: list[Any], img_shape: tuple[int, int]) -> np.ndarray:
        height, width = img_shape
        mask = np.zeros((height, width), dtype=np.uint8)
        for seg in filter(None, segs):
            if isinstance(seg, dict) and not isinstance(seg["counts"], list):
                runs = seg  # compressed already
            else:
                runs = pycocotools.mask.frPyObjects(seg, height, width)
            decoded = pycocotools.mask.decode(runs)
            mask |= decoded.reshape(height, width, -1).any(-1)
        return mask

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        super().transform(results)
        results["heatmap_mask"] = ~results["heatmap_mask"][None]
        return results


@TRANSFORMS.register_module()
class BottomupPyramid(BottomupResize):
    """The image at its test size and at further scales of the same field of view, for the multi-scale test.

    MMPose pads each scale on its own, so that their heatmaps show different parts of the world.

    Args:
        input_size: (width, height) of the original scale in pixels.
        aug_scales: the further scales.
        size_factor: sides of the original scale are multiples of it; size_factor * scale must be one of 32.
        options: those of MMPose's BottomupResize (resize_mode, pad_val).

    Raises:
        ValueError: a scale at which the sides are no multiple of 32.
    """

    def __init__(
        self,
        input_size: tuple[int, int],
        aug_scales: Sequence[float] = (2.0, 0.5),
        size_factor: int = 64,
        **options: Any,
    ) -> None:
        for scale in aug_scales:
            if size_factor * scale % SMALLEST_STRIDE:
                raise ValueError(
                    f"size_factor * scale must be a multiple of {SMALLEST_STRIDE}, got {size_factor}, {scale}"
                )
        super().__init__(tuple(input_size), None, size_factor, **options)
        self.pyramid = list(aug_scales)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        image = results["img"]
        super().transform(results)
        size = np.asarray(results["input_size"])
        zoom = size / results["input_scale"]
        warp = np.column_stack([np.diag(zoom), size / 2 - zoom * results["input_center"]])
        images = [results["img"]]
        for scale in self.pyramid:
            # pixel x covers x - 0.5 to x + 0.5: scale about the image's corner, not the first pixel's centre
            scaled = scale * warp + [[0, 0, (scale - 1) / 2]]
            shape = tuple(int(side) for side in size * scale)
            images.append(
                cv2.warpAffine(image, scaled, shape, flags=cv2.INTER_LINEAR, borderValue=self.pad_val)
            )
        results["img"], results["aug_scales"] = images, self.pyramid
        return results


@TRANSFORMS.register_module()
class PackBottomupInputs(PackPoseInputs):
    """Packs one image or a pyramid, with the meta keys of bottom-up tests.

    Those of MMPose include category_id, one per annotated person, with which the evaluation matches nobody.
    """

    def __init__(self, meta_keys: Sequence[str] = META_KEYS) -> None:
        super().__init__(tuple(meta_keys))

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        images = results["img"]
        if not isinstance(images, list):
            return super().transform(results)
        packed = super().transform({**results, "img": images[0]})
        packed["inputs"] = [image_to_tensor(image) for image in images]
        return packed
