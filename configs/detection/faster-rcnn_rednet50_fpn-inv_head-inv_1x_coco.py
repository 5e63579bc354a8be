# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Faster R-CNN with RedNet-50 and involutions in FPN and RPN; gradients are clipped."""

_base_ = "faster-rcnn_rednet50_fpn-inv_1x_coco.py"
model = dict(rpn_head=dict(type="InvolutionRPNHead"))
optim_wrapper = dict(clip_grad=dict(max_norm=5, norm_type=2))
