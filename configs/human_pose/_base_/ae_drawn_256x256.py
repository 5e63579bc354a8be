# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Associative embedding at 256x256 on drawn people, for a CPU; the backbone is the child's to give."""

_base_ = "./ae_coco_640x640.py"

codec = dict(input_size=(256, 256), heatmap_size=(64, 64))
model = dict(
    backbone=dict(depth=18, init_cfg=None),
    head=dict(in_channels=512, decoder=codec),
)
train_pipeline = [
    dict(type="LoadImage"),
    dict(
        type="BottomupRandomAffine",
        input_size=(256, 256),
        shift_factor=0.1,
        scale_factor=(0.75, 1.25),
        scale_type="long",
        rotate_factor=15,
        distribution="uniform",
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="GenerateTarget", encoder=dict(type="TrainableAssociativeEmbedding", **codec)),
    dict(type="UnannotatedMask"),
    dict(type="PackBottomupInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="BottomupResize", input_size=(256, 256), size_factor=32, resize_mode="fit"),
    dict(type="PackBottomupInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="InfiniteSampler"),
    dataset=dict(data_root="data/drawn_people/", pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root="data/drawn_people/", pipeline=test_pipeline),
)
test_dataloader = val_dataloader

train_cfg = dict(_delete_=True, by_epoch=False, max_iters=600, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=20, end=600),
]
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=200, max_keep_ckpts=1), logger=dict(interval=20)
)
log_processor = dict(by_epoch=False)
