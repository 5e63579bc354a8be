# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""UPerNet with RedNet-50 on Cityscapes."""

_base_ = "mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py"
custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="RedNet",
        depth=50,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/rednet50.pth"),
    ),
)
