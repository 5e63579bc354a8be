# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Bottom-up pose estimation with IC-ResNet-18, on a CPU."""

_base_ = "./res18_drawn_256x256.py"
model = dict(backbone=dict(pattern="pattern_zoo/scattered_digits/ic_resnet18_k9.json"))
