# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Mask R-CNN with IC-ResNeXt-101 32x4d."""

_base_ = "mask-rcnn_ic-r101-k9_fpn_1x_coco.py"
model = dict(
    backbone=dict(
        groups=32,
        base_width=4,
        pattern="pattern_zoo/scattered_digits/ic_resnext101_32x4d_k9.json",
        init_cfg=dict(checkpoint="checkpoints/ic_resnext101_32x4d_k9.pth"),
    )
)
