# SPDX-License-Identifier: Apache-2.0
"""ScatteredDigits: reproducible, well-formed and hard enough samples."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from search.data import ScatteredDigits, build_loader

DIGEST = """
import hashlib
from search.data import ScatteredDigits
sample = ScatteredDigits("val", length=10, seed=3)[7]
print(hashlib.sha256(b"".join(value.numpy().tobytes() for value in sample.values())).hexdigest())
"""


def digest(dataset: ScatteredDigits, index: int) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in dataset[index].values())).hexdigest()


def boxes_of(dataset: ScatteredDigits) -> list[torch.Tensor]:
    return [sample["boxes"][sample["labels"] >= 0] for sample in (dataset[i] for i in range(len(dataset)))]


@pytest.mark.parametrize("size", [64, 96])
def test_sample_form(size: int) -> None:
    dataset = ScatteredDigits("train", length=300, image_size=size, max_digits=4)
    for i in range(20):
        sample = dataset[i]
        assert sample["inputs"].shape == (3, size, size)
        assert sample["inputs"].dtype == torch.float32
        assert sample["boxes"].shape == (4, 4)
        assert sample["labels"].dtype == torch.int64
        used = sample["labels"] >= 0
        assert used.any()
        assert not sample["boxes"][~used].any()
    boxes = torch.cat(boxes_of(dataset))
    assert boxes.min() >= 0
    assert boxes.max() <= size
    longest = (boxes[:, 2:] - boxes[:, :2]).max(1).values * 64 / size
    assert 9.5 <= longest.min() < 12
    assert 55 < longest.max() <= 60.5
    for low, high in ((0, 20), (20, 40), (40, 99)):
        assert ((longest >= low) & (longest < high)).float().mean() > 0.2


def test_images_are_normalised_and_grey() -> None:
    images = torch.stack([ScatteredDigits(length=200)[i]["inputs"] for i in range(200)])
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1
    assert torch.equal(images[:, 0], images[:, 2])


def test_box_holds_all_ink_and_no_margin() -> None:
    dataset = ScatteredDigits(length=20, max_digits=1, noise=0)
    for i in range(20):
        sample = dataset[i]
        x0, y0, x1, y1 = sample["boxes"][0].int().tolist()
        image = sample["inputs"][0] - sample["inputs"][0].min()
        patch = image[y0:y1, x0:x1]
        assert patch.sum() == pytest.approx(image.sum().item())
        for edge in (patch[0], patch[-1], patch[:, 0], patch[:, -1]):
            assert edge.max() > 0


def test_digits_overlap_little() -> None:
    for boxes in boxes_of(ScatteredDigits(length=300)):
        sides = torch.min(boxes[:, None, 2:], boxes[None, :, 2:]) - torch.max(
            boxes[:, None, :2], boxes[None, :, :2]
        )
        common = sides.clamp_min(0).prod(-1).fill_diagonal_(0)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        assert (common <= 0.15 * torch.min(areas[:, None], areas[None])).all()


def test_splits_share_no_glyph_and_hold_every_digit() -> None:
    train, val = ScatteredDigits("train"), ScatteredDigits("val")
    assert not set(train.glyphs) & set(val.glyphs)
    assert len(train.glyphs) == 4000
    for dataset in (train, val):
        share = np.bincount(dataset._labels[dataset.glyphs], minlength=10) / len(dataset.glyphs)
        assert share == pytest.approx([0.1] * 10)


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"split": "train"}, {"index": 6}, {"noise": 0.1}],
    ids=lambda change: next(iter(change)),
)
def test_sample_depends_on(change: dict[str, Any]) -> None:
    options = {"split": "val", "seed": 3, "index": 7, "noise": 0.15}
    digests = []
    for one in (options, options | change):
        index = one.pop("index")
        digests.append(digest(ScatteredDigits(length=10, **one), index))  # type: ignore[arg-type]
    assert digests[0] != digests[1]


def test_same_in_a_fresh_process_and_after_other_samples() -> None:
    dataset = ScatteredDigits("val", length=10, seed=3)
    dataset[2]
    there = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout
    assert there.strip() == digest(dataset, 7)


@pytest.mark.parametrize("workers", [1, 2])
def test_same_batches_with_workers(workers: int) -> None:
    dataset = ScatteredDigits(length=10)
    loaders = (build_loader(dataset, 4, count) for count in (0, workers))
    for here, there in zip(*loaders, strict=True):
        assert all(torch.equal(here[key], there[key]) for key in ("inputs", "boxes", "labels"))


def test_workers_outlive_ctrl_c() -> None:
    batches = iter(build_loader(ScatteredDigits(length=40), 2, workers=1))
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGINT)
    assert len(list(batches)) == 19


def test_loader_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    next(iter(build_loader(ScatteredDigits(length=4), 2)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "train, val; got 'test'"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"image_size": 16}, "image_size must be at least 32, got 16"),
        ({"max_digits": 0}, "max_digits must be at least 1"),
        ({"noise": -1}, "noise must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ScatteredDigits(**options)


def test_index_out_of_range() -> None:
    with pytest.raises(IndexError, match=r"0\.\.2, got 3"):
        ScatteredDigits(length=3)[3]
