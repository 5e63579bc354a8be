# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""IC-ResNet-101 on ImageNet, with dilations up to 4."""

_base_ = "../_base_/imagenet_bs2048_130e.py"
model = dict(
    backbone=dict(type="ICResNet", depth=101, pattern="pattern_zoo/scattered_digits/ic_resnet101_k9.json")
)
