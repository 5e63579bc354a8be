# SPDX-License-Identifier: Apache-2.0
"""The associative-embedding head: it trains, and it tests with and without flips and scales."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData
from mmpose.models.heads import AssociativeEmbeddingHead
from mmpose.models.utils.tta import aggregate_heatmaps, flip_heatmaps
from mmpose.structures import PoseDataSample
from torch import Tensor


@MODELS.register_module()
class TrainableAssociativeEmbeddingHead(AssociativeEmbeddingHead):
    """MMPose's head with a masked heatmap loss and with every combination of flip and multi-scale test.

    Keys of ``test_cfg``: flip_test; multiscale_test (with the `BottomupPyramid` transform);
    restore_heatmap_size (heatmaps resized to the input before decoding); shift_heatmap and align_corners
    (leave both off: with `TrainableAssociativeEmbedding` the maps fit as they are); output_heatmaps.

    Args: those of `mmpose.models.heads.AssociativeEmbeddingHead`; `decoder` is the codec as it is.

    Example:
        >>> codec = dict(type="TrainableAssociativeEmbedding", input_size=(256, 256), heatmap_size=(64, 64))
        >>> head = TrainableAssociativeEmbeddingHead(512, 17, decoder=codec)
    """

    @property
    def default_init_cfg(self) -> list[dict[str, Any]]:
        """MMPose's deviation of 0.001 for deconvolutions gives their batch norms variances of 1e-6.

        The running ones, 1 at first, take over 150 steps to forget that: until then tests see other maps than
        the training.
        """
        return [
            {"type": "Kaiming", "layer": "ConvTranspose2d"},
            {"type": "Normal", "layer": "Conv2d", "std": 0.001},
            {"type": "Constant", "layer": "BatchNorm2d", "val": 1},
        ]

    def loss(
        self,
        feats: tuple[Tensor, ...],
        batch_data_samples: list[PoseDataSample],
        train_cfg: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """loss_kpt: mean squared error where people are annotated; loss_pull, loss_push: of the tags."""
        heatmaps, tags = (maps.float() for maps in self.forward(feats))
        if not self.tag_per_keypoint:
            tags = tags.repeat_interleave(self.num_keypoints, dim=1)
        fields = [sample.gt_fields for sample in batch_data_samples]
        targets = torch.stack([field.heatmaps for field in fields])
        if targets.shape != heatmaps.shape:
            raise ValueError(
                f"the network's heatmaps {tuple(heatmaps.shape)} must have the targets' shape "
                f"{tuple(targets.shape)}: check the head's deconv layers against the codec's heatmap_size"
            )
        masks = torch.stack([field.heatmap_mask for field in fields]) if "heatmap_mask" in fields[0] else None
        indices = [sample.gt_instance_labels.keypoint_indices for sample in batch_data_samples]
        pull, push = self.loss_module.tag_loss(tags, indices)
        return {
            "loss_kpt": self.loss_module.keypoint_loss(heatmaps, targets, None, masks),
            "loss_pull": pull,
            "loss_push": push,
        }

    def predict(
        self,
        feats: Any,
        batch_data_samples: list[PoseDataSample],
        test_cfg: dict[str, Any] | None = None,
    ) -> list[InstanceData] | tuple[list[InstanceData], list[PixelData]]:
        """People in each image; with test_cfg's output_heatmaps also the maps that they were read from.

        Args:
            feats: features of the backbone; a pair (image, flipped image) of them with flip_test; a list of
                that, the original scale first, with multiscale_test.
        """
        test_cfg = test_cfg or {}
        levels = feats if test_cfg.get("multiscale_test") else [feats]
        flip = test_cfg.get("flip_test", False)
        flips = batch_data_samples[0].metainfo["flip_indices"] if flip else None
        shift = test_cfg.get("shift_heatmap", False)
        outputs = [self._forward_level(level, flips, shift) for level in levels]

        stride = self.decoder.scale_factor[0]
        height, width = outputs[0][0][0].shape[-2:]
        if test_cfg.get("restore_heatmap_size"):
            height, width, stride = round(height * stride), round(width * stride), 1
        align = test_cfg.get("align_corners", False)
        heatmaps = [maps for level in outputs for maps, _ in level]
        heatmap = aggregate_heatmaps(heatmaps, (width, height), align, mode="average")
        tag = aggregate_heatmaps([tags for _, tags in outputs[0]], (width, height), align, mode="concat")
        people = self.decode((heatmap, tag, stride))
        if not test_cfg.get("output_heatmaps"):
            return people
        return people, [
            PixelData(heatmaps=h, tags=t) for h, t in zip(heatmap.detach(), tag.detach(), strict=True)
        ]

    def _forward_level(
        self, feats: Any, flip_indices: list[int] | None, shift: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Heatmaps and tags of one scale; those of the flipped image, flipped back, are the second pair."""
        if flip_indices is None:
            return [self.forward(feats)]
        heatmaps, tags = self.forward(feats[1])
        heatmaps = flip_heatmaps(heatmaps, flip_indices, "heatmap", shift)
        return [self.forward(feats[0]), (heatmaps, self._flip_tags(tags, flip_indices, shift))]
