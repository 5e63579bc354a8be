# SPDX-License-Identifier: Apache-2.0
"""The backbones, layers, necks and heads for OpenMMLab's configs, registered in MMEngine's root registry.

    custom_imports = dict(imports=['ic_conv.openmmlab'], allow_failed_imports=False)

Necks and heads extend classes of MMDetection and MMSegmentation; these are imported when a config uses them.
"""

from ic_conv.openmmlab._lazy import register_lazily
from ic_conv.openmmlab.backbones import CedNet, ICResNet, RedNet, SuperResNet
from ic_conv.openmmlab.layers import ConvCVolution2d, ConvInvolution2d
from ic_conv.openmmlab.search_hook import DilationSearchHook

register_lazily("InvolutionFPN", "ic_conv.openmmlab.necks", "mmdet")
register_lazily("SegInvolutionFPN", "ic_conv.openmmlab.seg_necks", "mmseg")
register_lazily("InvolutionRPNHead", "ic_conv.openmmlab.heads", "mmdet")
register_lazily("InvolutionFCNMaskHead", "ic_conv.openmmlab.heads", "mmdet")

__all__ = [
    "CedNet",
    "ConvCVolution2d",
    "ConvInvolution2d",
    "DilationSearchHook",
    "ICResNet",
    "RedNet",
    "SuperResNet",
]
