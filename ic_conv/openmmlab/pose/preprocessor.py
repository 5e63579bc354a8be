# SPDX-License-Identifier: Apache-2.0
"""Normalises image pyramids."""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS
from mmpose.models.data_preprocessors import PoseDataPreprocessor
from torch import Tensor


@MODELS.register_module()
class PyramidPreprocessor(PoseDataPreprocessor):
    """MMPose's preprocessor that also takes a list of scales, as `BottomupPyramid` gives; options as there.

    Shape:
        inputs: a batch of images, or a sequence of batches, one per scale; the result is alike, with a tuple.
    """

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        levels = data["inputs"]
        if isinstance(levels[0], Tensor):
            return super().forward(data, training)
        # the original scale comes last, so that the samples keep its shape
        forward = super().forward
        done = [forward({**data, "inputs": level}, training) for level in levels[::-1]]
        return {**done[-1], "inputs": tuple(level["inputs"] for level in done[::-1])}
