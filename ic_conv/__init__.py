# SPDX-License-Identifier: Apache-2.0
"""Inception convolution and involution: layers and backbones that use dilation patterns."""

from ic_conv.convert import apply_pattern, searchable_layers
from ic_conv.fuse import fuse
from ic_conv.layers import CVolution2d, ICConv2d, Involution2d
from ic_conv.models import (
    cednet38,
    cednet50,
    ic_resnet18,
    ic_resnet34,
    ic_resnet50,
    ic_resnet101,
    ic_resnet152,
    ic_resnext101_32x4d,
    rednet26,
    rednet38,
    rednet50,
    rednet101,
    rednet152,
)
from ic_conv.pattern import DilationPattern, LayerPattern

__all__ = [
    "CVolution2d",
    "DilationPattern",
    "ICConv2d",
    "Involution2d",
    "LayerPattern",
    "apply_pattern",
    "cednet38",
    "cednet50",
    "fuse",
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
    "searchable_layers",
]
