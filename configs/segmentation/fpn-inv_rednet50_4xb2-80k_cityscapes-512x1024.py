# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Semantic FPN with RedNet-50 and an FPN with involutions on Cityscapes."""

_base_ = "fpn_rednet50_4xb2-80k_cityscapes-512x1024.py"
model = dict(neck=dict(type="SegInvolutionFPN", output_cfg=dict(type="Involution2d", kernel_size=7)))
