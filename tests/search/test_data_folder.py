# SPDX-License-Identifier: Apache-2.0
"""FolderImages: splits, reproducible views, and what is said about a bad folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from search.data import FolderImages, build_loader


def make_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        for i in range(6):
            make_image(tmp_path / "photos" / name / f"{i}.{'jpg' if i % 2 else 'png'}", 10 * label + i)
    return tmp_path / "photos"


def test_splits(folder: Path) -> None:
    train, val = FolderImages(folder, "train", views=3), FolderImages(folder, "val")
    assert (len(train), len(val)) == (30, 2)
    assert not set(train.samples) & set(val.samples)
    assert (train.classes, train.num_classes) == (["cat", "dog"], 2)
    assert [Path(path).parent.name for path, _ in val.samples] == ["cat", "dog"]
    assert [int(val[i]["labels"]) for i in range(2)] == [0, 1]


def test_batches_are_the_same_with_workers(folder: Path) -> None:
    dataset = FolderImages(folder, image_size=32, views=1)
    for here, there in zip(build_loader(dataset, 4), build_loader(dataset, 4, workers=2), strict=True):
        assert here["inputs"].shape[1:] == (3, 32, 32)
        assert here["inputs"].dtype == torch.float32
        assert torch.equal(here["inputs"], there["inputs"])
        assert torch.equal(here["labels"], there["labels"])


def test_views_differ_by_index_and_seed_alone(folder: Path) -> None:
    dataset = FolderImages(folder, views=2)
    other = FolderImages(folder, views=2, seed=1)
    state = torch.get_rng_state()
    first = dataset[0]["inputs"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(dataset[0]["inputs"], first)
    assert not torch.equal(dataset[10]["inputs"], first)  # the second view of the same image
    assert not torch.equal(other[0]["inputs"], first)


def empty(root: Path) -> Path:
    root.mkdir()
    return root


def no_classes(root: Path) -> Path:
    make_image(root / "a.png", 0)
    return root


def empty_class(root: Path) -> Path:
    make_image(root / "cat" / "a.png", 0)
    (root / "dog").mkdir()
    return root / "dog"


def not_an_image(root: Path) -> Path:
    make_image(root / "cat" / "a.png", 0)
    (root / "cat" / "b.jpg").write_text("no image")
    return root / "cat" / "b.jpg"


def truncated(root: Path) -> Path:
    path = root / "cat" / "b.jpg"
    make_image(path, 0)
    path.write_bytes(path.read_bytes()[:-400])
    return path


def too_few(root: Path) -> Path:
    make_image(root / "cat" / "a.png", 0)
    return root


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root, "must exist"),
        (empty, "is empty"),
        (no_classes, "one folder of images per class"),
        (empty_class, "every class folder must hold images"),
        (not_an_image, "not an image"),
        (truncated, "truncated"),
        (too_few, "at least 5 readable images"),
    ],
)
def test_bad_folder(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    named = make(tmp_path / "photos")
    with pytest.raises(ValueError, match=words) as error:
        FolderImages(tmp_path / "photos", "val")
    assert str(named) in str(error.value) or named.name in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_images_are_skipped_by_wish(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [folder / "cat" / "bad.jpg", folder / "dog" / "worse.png"]
    for path in bad:
        path.write_text("no image")
    with pytest.raises(ValueError, match="and 1 more"):
        FolderImages(folder)
    with caplog.at_level(logging.WARNING):
        dataset = FolderImages(folder, skip_bad=True)
    assert [str(path) in record.message for path, record in zip(bad, caplog.records, strict=True)] == [
        True,
        True,
    ]
    assert not {str(path) for path in bad} & {path for path, _ in dataset.samples}
