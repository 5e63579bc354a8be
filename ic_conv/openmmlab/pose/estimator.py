# SPDX-License-Identifier: Apache-2.0
"""The pose estimator that tests image pyramids."""

from __future__ import annotations

from mmengine.registry import MODELS
from mmpose.models.pose_estimators import BottomupPoseEstimator
from mmpose.structures import PoseDataSample
from torch import Tensor


@MODELS.register_module()
class BottomupPyramidEstimator(BottomupPoseEstimator):
    """MMPose's estimator, of which one method stacks a list of images and the next one asks for that list.

    Args: those of `mmpose.models.pose_estimators.BottomupPoseEstimator`.
    """

    def predict(
        self, inputs: Tensor | tuple[Tensor, ...], data_samples: list[PoseDataSample]
    ) -> list[PoseDataSample]:
        """The samples with their people; `inputs` is a batch, or a tuple of batches, one per scale."""
        return super().predict(list(inputs) if isinstance(inputs, tuple) else inputs, data_samples)
