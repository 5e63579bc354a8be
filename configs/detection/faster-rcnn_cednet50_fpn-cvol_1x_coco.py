# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Faster R-CNN with CedNet-50 and an FPN with C-volutions."""

_base_ = "faster-rcnn_rednet50_fpn-inv_1x_coco.py"
model = dict(
    backbone=dict(type="CedNet", init_cfg=dict(checkpoint="checkpoints/cednet50.pth")),
    neck=dict(output_cfg=dict(type="CVolution2d", kernel_size=9)),
)
