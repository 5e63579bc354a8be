# SPDX-License-Identifier: Apache-2.0
"""Backbones that use dilation patterns."""

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
    "ResNet",
    "ic_resnet",
    "ic_resnet18",
    "ic_resnet34",
    "ic_resnet50",
    "ic_resnet101",
    "ic_resnet152",
    "ic_resnext101_32x4d",
]
