# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Supernet training on scattered digits: MMEngine settings that options of the command line override."""

train_cfg = dict(by_epoch=False, max_iters=250)
train_dataloader = dict(batch_size=16, num_workers=1)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
# begin and end follow max_iters when the steps are overridden
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=25),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=False, begin=25, end=250),
]
checkpoint_interval = 100  # steps
