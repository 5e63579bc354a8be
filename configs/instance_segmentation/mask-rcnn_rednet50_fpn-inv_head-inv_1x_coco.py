# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Mask R-CNN with RedNet-50 and involutions in FPN, RPN and mask head; gradients are clipped."""

_base_ = "mask-rcnn_rednet50_fpn-inv_1x_coco.py"
model = dict(
    rpn_head=dict(type="InvolutionRPNHead"),
    roi_head=dict(mask_head=dict(type="InvolutionFCNMaskHead")),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5, norm_type=2))
