# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Bottom-up pose estimation with RedNet-50, the recipe of ResNet-50."""

_base_ = "./_base_/ae_coco_640x640.py"
# for published weights: init_cfg=dict(type="Pretrained", checkpoint=FILE, prefix="backbone.")
model = dict(backbone=dict(_delete_=True, type="RedNet", depth=50, out_indices=(3,), stem_kernel_size=3))
