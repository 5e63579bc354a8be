# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""The supernet of ResNet-18: trained on poses, searched for the dilations of IC-ResNet-18."""

_base_ = "./res18_drawn_256x256.py"
model = dict(backbone=dict(type="SuperResNet", kernel_size=9))
