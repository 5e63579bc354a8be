# SPDX-License-Identifier: Apache-2.0
"""MMDetection's RPN head and FCN mask head with involutions for their 3x3 convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import nn

from ic_conv.openmmlab.layers import INVOLUTION, in_place_of


class InvolutionRPNHead(RPNHead):
    """RPN head whose 3x3 convolutions are involutions, followed by a ReLU as before.

    Args:
        args, options: those of MMDetection's RPNHead.
        conv_cfg: the layer in place of a 3x3 convolution.

    Raises:
        ValueError: in_channels and feat_channels differ, which an involution cannot do.
    """

    def __init__(self, *args: Any, conv_cfg: Mapping[str, Any] = INVOLUTION, **options: Any) -> None:
        super().__init__(*args, **options)
        convs = self.get_submodule("rpn_conv")
        if isinstance(convs, nn.Conv2d):
            self.rpn_conv = in_place_of(convs, conv_cfg)
            return
        for module in convs:
            module.conv = in_place_of(module.conv, conv_cfg)


class InvolutionFCNMaskHead(FCNMaskHead):
    """FCN mask head whose 3x3 convolutions are involutions, followed by ReLUs as before.

    State dicts of the published head load, too.

    Args:
        args, options: those of MMDetection's FCNMaskHead.
        conv_cfg: the layer in place of a 3x3 convolution.

    Raises:
        ValueError: in_channels and conv_out_channels differ, which an involution cannot do.
    """

    def __init__(self, *args: Any, conv_cfg: Mapping[str, Any] = INVOLUTION, **options: Any) -> None:
        super().__init__(*args, conv_cfg=dict(conv_cfg), **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for index in range(len(self.convs)):  # published as a Sequential of involution and ReLU
            published, own = f"{prefix}convs.{index}.0.", f"{prefix}convs.{index}.conv."
            for key in [key for key in state_dict if key.startswith(published)]:
                state_dict[own + key.removeprefix(published)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)
