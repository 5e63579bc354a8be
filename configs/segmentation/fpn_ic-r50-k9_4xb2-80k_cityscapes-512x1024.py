# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Semantic FPN with IC-ResNet-50 on Cityscapes."""

_base_ = "fpn_rednet50_4xb2-80k_cityscapes-512x1024.py"
model = dict(
    backbone=dict(
        type="ICResNet",
        pattern="pattern_zoo/scattered_digits/ic_resnet50_k9.json",
        init_cfg=dict(checkpoint="checkpoints/ic_resnet50_k9.pth"),
    )
)
