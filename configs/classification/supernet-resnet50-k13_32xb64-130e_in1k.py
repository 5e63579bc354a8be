# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""The supernet of ResNet-50 with 13x13 kernels on ImageNet: what a dilation search starts from."""

_base_ = "../_base_/imagenet_bs2048_130e.py"
model = dict(backbone=dict(type="SuperResNet", depth=50, kernel_size=13))
