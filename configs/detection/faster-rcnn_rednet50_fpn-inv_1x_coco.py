# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Faster R-CNN with RedNet-50 and an FPN with involutions, which needs a longer warm-up."""

_base_ = "faster-rcnn_rednet50_fpn_1x_coco.py"
model = dict(neck=dict(type="InvolutionFPN", output_cfg=dict(type="Involution2d", kernel_size=7)))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=2000),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
