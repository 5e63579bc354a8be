# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""ImageNet as published: batch 2048 (32 processes of 64 images), lr 0.8, label smoothing, 130 epochs."""

_base_ = "mmpretrain::resnet/resnet50_32xb64-warmup-coslr_in1k.py"
custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
model = dict(head=dict(loss=dict(_delete_=True, type="LabelSmoothLoss", label_smooth_val=0.1)))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.25, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=125, begin=5, end=130),
]
train_cfg = dict(max_epochs=130)
