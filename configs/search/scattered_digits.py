# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 (the style of MMEngine configs)
"""Supernet training on scattered digits: MMEngine settings that options of the command line override."""

train_cfg = dict(by_epoch=False, max_iters=160)
# a batch takes a few ms to make: less than it costs to fetch it from a worker on 2 cores
train_dataloader = dict(batch_size=8, num_workers=0)
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4),
    clip_grad=dict(max_norm=5.0),
)
# begin and end follow max_iters when the steps are overridden
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=16),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=False, begin=16, end=160),
]
checkpoint_interval = 100  # steps
