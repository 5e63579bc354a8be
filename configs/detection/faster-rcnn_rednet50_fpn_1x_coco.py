# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Faster R-CNN with RedNet-50."""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
model = dict(backbone=dict(type="RedNet", init_cfg=dict(checkpoint="checkpoints/rednet50.pth")))
