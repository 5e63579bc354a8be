# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""RedNet-50 on ImageNet."""

_base_ = "../_base_/imagenet_bs2048_130e.py"
model = dict(backbone=dict(type="RedNet", depth=50))
