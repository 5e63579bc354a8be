# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Cascade Mask R-CNN with IC-ResNet-101."""

_base_ = "cascade-mask-rcnn_ic-r50-k9_fpn_1x_coco.py"
model = dict(
    backbone=dict(
        depth=101,
        pattern="pattern_zoo/scattered_digits/ic_resnet101_k9.json",
        init_cfg=dict(checkpoint="checkpoints/ic_resnet101_k9.pth"),
    )
)
