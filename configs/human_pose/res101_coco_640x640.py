# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Bottom-up pose estimation with the plain ResNet-101; 8 GPUs of 12 images."""

_base_ = "./_base_/ae_coco_640x640.py"
model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint="torchvision://resnet101")))
optim_wrapper = dict(optimizer=dict(lr=5e-4))
train_dataloader = dict(batch_size=12)
auto_scale_lr = dict(base_batch_size=96)
