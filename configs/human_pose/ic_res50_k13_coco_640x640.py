# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Bottom-up pose estimation with IC-ResNet-50."""

_base_ = "./res50_coco_640x640.py"
model = dict(backbone=dict(pattern="pattern_zoo/scattered_digits/ic_resnet50_k13.json"))
