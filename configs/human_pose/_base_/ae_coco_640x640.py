# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Associative embedding on COCO at 640x640, the published recipe for ResNet-50; 8 GPUs of 16 images."""

_base_ = "mmpose::body_2d_keypoint/associative_embedding/coco/ae_hrnet-w32_8xb24-300e_coco-512x512.py"
custom_imports = dict(imports=["ic_conv.openmmlab", "ic_conv.openmmlab.pose"], allow_failed_imports=False)

optim_wrapper = dict(optimizer=dict(lr=1e-3))
auto_scale_lr = dict(base_batch_size=128)

codec = dict(
    _delete_=True,
    type="TrainableAssociativeEmbedding",
    input_size=(640, 640),
    heatmap_size=(160, 160),
    sigma=2,
    decode_keypoint_thr=0.1,
    decode_tag_thr=1.0,
    decode_max_instances=30,
)
decoder = dict(codec)
decoder.pop("_delete_")

model = dict(
    type="BottomupPyramidEstimator",
    data_preprocessor=dict(type="PyramidPreprocessor"),
    backbone=dict(
        _delete_=True,
        type="ICResNet",
        depth=50,
        out_indices=(3,),
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    head=dict(
        _delete_=True,
        type="TrainableAssociativeEmbeddingHead",
        in_channels=2048,
        num_keypoints=17,
        tag_loss=dict(type="VectorizedAssociativeEmbeddingLoss", loss_weight=0.001, reduction="mean"),
        decoder=decoder,
    ),
    test_cfg=dict(restore_heatmap_size=False),
)

train_pipeline = [
    dict(type="LoadImage"),
    # published: 40 pixels of every 200 of the image's side
    dict(
        type="BottomupRandomAffine",
        input_size=(640, 640),
        shift_factor=0.2,
        scale_factor=(0.75, 1.5),
        scale_type="short",
        rotate_factor=30,
        distribution="uniform",
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="GenerateTarget", encoder=decoder),
    dict(type="UnannotatedMask"),
    dict(type="PackBottomupInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="BottomupResize", input_size=(640, 640), size_factor=64, resize_mode="expand"),
    dict(type="PackBottomupInputs"),
]

train_dataloader = dict(batch_size=16, dataset=dict(type="BottomupCocoDataset", pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type="BottomupCocoDataset", pipeline=test_pipeline))
test_dataloader = val_dataloader
# without ann_file: the annotations are the data set's
val_evaluator = dict(_delete_=True, type="CocoMetric", nms_mode="none", score_mode="bbox")
test_evaluator = val_evaluator
