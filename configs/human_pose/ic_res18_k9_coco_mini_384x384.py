# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""IC-ResNet-18 learns four COCO images by heart: a check of the whole way, minutes on a CPU."""

_base_ = "./_base_/ae_coco_640x640.py"

size = (384, 384)
codec = dict(input_size=size, heatmap_size=(96, 96))
decoder = codec
model = dict(
    backbone=dict(depth=18, pattern="pattern_zoo/scattered_digits/ic_resnet18_k9.json", init_cfg=None),
    head=dict(in_channels=512, decoder=codec),
    test_cfg=dict(flip_test=False),
)

# without augmentation, in the test's own geometry: the whole image, padded
train_pipeline = [
    dict(type="LoadImage"),
    dict(
        type="BottomupRandomAffine",
        input_size=size,
        scale_type="long",
        shift_prob=0,
        scale_prob=0,
        rotate_prob=0,
    ),
    dict(type="GenerateTarget", encoder=dict(type="TrainableAssociativeEmbedding", **codec)),
    dict(type="UnannotatedMask"),
    dict(type="PackBottomupInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="BottomupResize", input_size=size, size_factor=32, resize_mode="fit"),
    dict(type="PackBottomupInputs"),
]
data = dict(data_root="../shared/data/coco_mini/", ann_file="test_coco.json", data_prefix=dict(img=""))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="InfiniteSampler"),
    dataset=dict(pipeline=train_pipeline, **data),
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **data))
test_dataloader = val_dataloader

train_cfg = dict(_delete_=True, by_epoch=False, max_iters=400, val_interval=100)
param_scheduler = [dict(type="CosineAnnealingLR", begin=50, end=400, by_epoch=False)]
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1), logger=dict(interval=10)
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
