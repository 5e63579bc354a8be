# SPDX-License-Identifier: Apache-2.0
"""MMSegmentation's FPN with involutions or C-volutions for its output convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmseg.models.necks.fpn import FPN

from ic_conv.openmmlab.layers import INVOLUTION, set_output_layers


class SegInvolutionFPN(FPN):
    """FPN whose 3x3 output convolutions are involutions; as `InvolutionFPN`, for MMSegmentation."""

    def __init__(self, *args: Any, output_cfg: Mapping[str, Any] = INVOLUTION, **options: Any) -> None:
        super().__init__(*args, **options)
        set_output_layers(self, output_cfg)
