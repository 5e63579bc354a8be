# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Tested at the scales 1, 2 and 0.5."""

_base_ = "./ic_res101_k13_coco_640x640.py"

model = dict(test_cfg=dict(multiscale_test=True, restore_heatmap_size=True))
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="BottomupPyramid", input_size=(640, 640), aug_scales=(2, 0.5), resize_mode="expand"),
    dict(type="PackBottomupInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
