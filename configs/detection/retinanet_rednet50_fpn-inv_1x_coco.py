# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""RetinaNet with RedNet-50 and an FPN with involutions; gradients are clipped."""

_base_ = "retinanet_rednet50_fpn_1x_coco.py"
model = dict(neck=dict(type="InvolutionFPN", output_cfg=dict(type="Involution2d", kernel_size=7)))
optim_wrapper = dict(clip_grad=dict(max_norm=40, norm_type=2))
