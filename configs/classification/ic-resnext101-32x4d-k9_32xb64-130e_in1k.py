# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""IC-ResNeXt-101 32x4d on ImageNet, with dilations up to 4."""

_base_ = "../_base_/imagenet_bs2048_130e.py"
model = dict(
    backbone=dict(
        type="ICResNet",
        depth=101,
        groups=32,
        base_width=4,
        pattern="pattern_zoo/scattered_digits/ic_resnext101_32x4d_k9.json",
    )
)
