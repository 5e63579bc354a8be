# SPDX-License-Identifier: Apache-2.0
"""Backbones that use dilation patterns."""

from ic_conv.models.cednet import cednet38, cednet50
from ic_conv.models.rednet import RedNet, rednet26, rednet38, rednet50, rednet101, rednet152
from ic_conv.models.resnet import (
    ResNet,
    ic_resnet,
    ic_resnet18,
    ic_resnet34,
    ic_resnet50,
    ic_resnet101,
    ic_resnet152,
    ic_resnext101_32x4d,
)

__all__ = [
    "RedNet",
    "ResNet",
    "ic_resnet",
    "ic_resnet18",
    "ic_resnet34",
    "ic_resnet50",
    "ic_resnet101",
    "ic_resnet152",
    "ic_resnext101_32x4d",
    "rednet26",
    "rednet38",
    "rednet50",
    "rednet101",
    "rednet152",
    "cednet38",
    "cednet50",
]
