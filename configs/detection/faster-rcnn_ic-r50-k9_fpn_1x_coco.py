# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Faster R-CNN with IC-ResNet-50."""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        type="ICResNet",
        pattern="pattern_zoo/scattered_digits/ic_resnet50_k9.json",
        init_cfg=dict(checkpoint="checkpoints/ic_resnet50_k9.pth"),
    )
)
