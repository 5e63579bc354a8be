# SPDX-License-Identifier: Apache-2.0
"""MMDetection's FPN with involutions or C-volutions for its output convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.models.necks import FPN

from ic_conv.openmmlab.layers import INVOLUTION, set_output_layers


class InvolutionFPN(FPN):
    """FPN whose 3x3 output convolutions are involutions (Li et al., CVPR 2021, sec. 4.2).

    The lateral 1x1 convolutions stay, and so do the strided ones that make extra levels, RetinaNet's for
    example.

    Args:
        args, options: those of MMDetection's FPN.
        output_cfg: the layer in place of an output convolution.

    Example:
        >>> neck = dict(type="InvolutionFPN", output_cfg=dict(type="CVolution2d", kernel_size=9))
    """

    def __init__(self, *args: Any, output_cfg: Mapping[str, Any] = INVOLUTION, **options: Any) -> None:
        super().__init__(*args, **options)
        set_output_layers(self, output_cfg)
