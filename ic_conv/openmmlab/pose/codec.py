# SPDX-License-Identifier: Apache-2.0
"""Targets and decoding of associative embedding, so that what is encoded is also what is decoded."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from mmpose.codecs import AssociativeEmbedding
from mmpose.codecs.utils import batch_heatmap_nms
from mmpose.registry import KEYPOINT_CODECS
from mmpose.utils.tensor_utils import to_numpy
from torch import Tensor

from ic_conv.openmmlab.pose.grouping import group_by_tags
from ic_conv.openmmlab.pose.peaks import fill_missing, gaussian_maps, refine_peaks

STRIDE = 4  # input pixels per heatmap pixel: a stride-32 backbone and three deconvolutions

COCO_ORDER = (0, 1, 2, 3, 4, 5, 6, 11, 12, 7, 8, 9, 10, 13, 14, 15, 16)  # head and torso first


@KEYPOINT_CODECS.register_module()
class TrainableAssociativeEmbedding(AssociativeEmbedding):
    """MMPose's codec with the mapping tables that training needs, and one geometry both ways.

    A heatmap pixel is the square of input pixels under it; pixel h lies at ``stride * (h + 0.5) - 0.5``.
    So a flipped heatmap is the heatmap of the flipped image, and resizing heatmaps moves nothing. Gaussians
    are centred on the joint itself, not on the nearest pixel, and decoding finds that centre again.

    Dimension letters: N people, K joints, L tag values per joint, H, W size of the heatmaps.

    Args:
        input_size: (width, height) of the training images in pixels.
        heatmap_size: (width, height) of the heatmaps: a quarter of it.
        sigma: of the Gaussians, in heatmap pixels.
        decode_keypoint_order: order in which joints are grouped; the default is COCO's head, torso, limbs.
        decode_options: the other decode options of MMPose's codec; decode_max_instances keeps the best.

    Raises:
        ValueError: a heatmap size that is not input_size / 4, or use_udp, which is another geometry.

    Source: Newell et al., Associative Embedding, NIPS 2017; sub-pixel centres: Zhang et al., DARK, CVPR 2020.

    Example:
        >>> codec = TrainableAssociativeEmbedding(input_size=(256, 256), heatmap_size=(64, 64))
        >>> codec.encode(np.full((1, 17, 2), 100.0))["heatmaps"].shape
        (17, 64, 64)
    """

    field_mapping_table: ClassVar = {"heatmaps": "heatmaps", "heatmap_mask": "heatmap_mask"}
    label_mapping_table: ClassVar = {
        "keypoint_indices": "keypoint_indices",
        "keypoint_weights": "keypoint_weights",
    }

    def __init__(
        self,
        input_size: tuple[int, int],
        heatmap_size: tuple[int, int],
        sigma: float = 2.0,
        decode_keypoint_order: tuple[int, ...] = COCO_ORDER,
        **decode_options: Any,
    ) -> None:
        if any(size != STRIDE * cells for size, cells in zip(input_size, heatmap_size, strict=True)):
            raise ValueError(
                f"heatmap_size must be input_size / {STRIDE} = {tuple(s / STRIDE for s in input_size)}, "
                f"got {tuple(heatmap_size)} for input_size {tuple(input_size)}"
            )
        if decode_options.get("use_udp"):
            raise ValueError("use_udp=True is another geometry; this codec is unbiased without it")
        super().__init__(
            tuple(input_size),
            tuple(heatmap_size),
            sigma,
            decode_keypoint_order=list(decode_keypoint_order),
            **decode_options,
        )

    def encode(
        self, keypoints: np.ndarray, keypoints_visible: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Targets of the people of one image.

        Args:
            keypoints: places in the input image in pixels, (N, K, 2).
            keypoints_visible: above 0.5 where a joint is annotated, (N, K); None: everywhere.

        Returns:
            heatmaps (K, H, W); keypoint_indices (N, K, 2), per joint y*W+x and whether it lies in the image;
            keypoint_weights (N, K), the latter as a number.
        """
        if keypoints_visible is None:
            keypoints_visible = np.ones(keypoints.shape[:2], dtype=np.float32)
        width, height = self.heatmap_size
        points = (keypoints[..., :2] + 0.5) / self.scale_factor - 0.5
        annotated = keypoints_visible > 0.5
        cells = np.floor(points + 0.5).astype(np.int64)
        inside = annotated & (cells >= 0).all(-1) & (cells < (width, height)).all(-1)
        place = np.where(inside, cells[..., 1] * width + cells[..., 0], 0)
        return {
            "heatmaps": gaussian_maps(points, annotated, (height, width), self.sigma),
            "keypoint_indices": np.stack([place, inside], axis=-1).astype(np.int64),
            "keypoint_weights": inside.astype(np.float32),
        }

    def batch_decode(
        self, batch_heatmaps: Tensor, batch_tags: Tensor, stride: float = STRIDE
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """People in a batch of images, the most certain first.

        Args:
            batch_heatmaps: (B, K, H, W).
            batch_tags: (B, L*K, H, W).
            stride: input pixels per pixel of these maps; 1 when they were resized to the input.

        Returns:
            per image: places in the input image in pixels (N, K, 2), scores of joints (N, K), of people (N,).
        """
        size = batch_heatmaps.shape[-2] * batch_heatmaps.shape[-1]
        peaks = batch_heatmap_nms(batch_heatmaps, self.decode_nms_kernel)
        candidates = self._get_batch_topk(peaks, batch_tags, k=min(self.decode_topk, size))
        reach = max(1, round(STRIDE / stride))
        arrays = [to_numpy(tensor) for tensor in (*candidates, batch_heatmaps, batch_tags)]
        images = [self._decode_image(reach, *image) for image in zip(*arrays, strict=True)]
        places, scores, people = (list(column) for column in zip(*images, strict=True))
        return [(p + 0.5 + self.decode_center_shift) * stride - 0.5 for p in places], scores, people

    def _decode_image(
        self,
        reach: int,
        peak_scores: np.ndarray,
        peak_tags: np.ndarray,
        peak_places: np.ndarray,
        heatmaps: np.ndarray,
        tags: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        groups = group_by_tags(
            peak_scores,
            peak_tags,
            peak_places,
            self.decode_keypoint_order,
            self.decode_keypoint_thr,
            self.decode_tag_thr,
        )
        best = np.argsort(-groups[..., 2].mean(1), kind="stable")[: self.decode_max_instances]
        groups = groups[best]
        people = groups[..., 2].mean(1)
        cells, scores = fill_missing(groups[..., :2].astype(np.int64), groups[..., 2], heatmaps, tags)
        return refine_peaks(cells, heatmaps, reach), scores, people
