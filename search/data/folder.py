# SPDX-License-Identifier: Apache-2.0
"""The user's own images: a folder with one folder of images per class."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

logger = logging.getLogger(__name__)

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's models expect


class FolderImages(Dataset[dict[str, Tensor]]):
    """Images of class folders: `root/cat/1.jpg`, `root/dog/2.png`.

    Every fifth image of a class belongs to `val`: resized and centre-cropped. The others are `train`:
    each counts `views` times, cropped and flipped at random by (seed, index) alone.

    Legend: H = W image size.

    Args:
        root: the folder.
        split: "train" or "val".
        image_size: side of the images in px.
        views: number of random views of each training image.
        seed: any integer from 0 up, of the random views.
        skip_bad: leave out unreadable images, each named in a warning, instead of refusing them.

    Shape:
        sample: dict of inputs (3, H, W) float32, normalised; labels () int64.

    Raises:
        ValueError: the folder is missing, empty or has no class folders, an image cannot be read, or the
            split has no image. The message names the path.

    Example:
        >>> FolderImages("photos", image_size=64)[0]["labels"]
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        image_size: int = 64,
        views: int = 100,
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split must be one of train, val; got {split!r}")
        for name, value, least in (("image_size", image_size, 1), ("views", views, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        folder = _open(Path(root))
        samples = _readable(folder.samples, skip_bad)
        self.classes, self.num_classes = folder.classes, len(folder.classes)
        self.samples = _split(samples, split)
        if not self.samples:
            raise ValueError(f"a class folder needs at least 5 readable images for a {split} split: {root}")
        self.views = views if split == "train" else 1
        self.seed = seed
        first = (
            [v2.RandomResizedCrop(image_size, scale=(0.35, 1), antialias=True), v2.RandomHorizontalFlip()]
            if split == "train"
            else [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
        )
        self._transform = v2.Compose(
            [v2.ToImage(), *first, v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
        )

    def __len__(self) -> int:
        return len(self.samples) * self.views

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample must lie in 0..{len(self) - 1}, got {index}")
        path, label = self.samples[index % len(self.samples)]
        with Image.open(path) as file:
            image = file.convert("RGB")
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's global generator
            torch.manual_seed(self.seed * 0x9E3779B1 + index)
            inputs = self._transform(image)
        return {"inputs": inputs.as_subclass(Tensor), "labels": torch.tensor(label)}


def _open(root: Path) -> ImageFolder:
    if not root.is_dir():
        raise ValueError(f"the image folder must exist, got {root}")
    if not any(child.is_dir() for child in root.iterdir()):
        rule = "must hold one folder of images per class" if any(root.iterdir()) else "is empty"
        raise ValueError(f"the image folder {rule}: {root}")
    try:
        return ImageFolder(root)
    except FileNotFoundError as error:  # a class folder without an image; torchvision names the classes
        raise ValueError(f"every class folder must hold images: {root}: {error}") from error


def _readable(samples: list[tuple[str, int]], skip_bad: bool) -> list[tuple[str, int]]:
    """The samples whose image can be decoded; all are tried now, not in the middle of a training."""
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(_why_unreadable, (path for path, _ in samples)))
    bad = [f"{path} ({reason})" for (path, _), reason in zip(samples, reasons, strict=True) if reason]
    if bad and not skip_bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"every image must be readable (skip_bad leaves bad ones out): {bad[0]}{more}")
    for line in bad:
        logger.warning("left out an unreadable image: %s", line)
    return [sample for sample, reason in zip(samples, reasons, strict=True) if not reason]


def _why_unreadable(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (32, 32))  # a JPEG is read to its end, but decoded at low resolution
            image.load()
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # Pillow's decoders raise many types
        return str(error) or type(error).__name__
    return None


def _split(samples: list[tuple[str, int]], split: str) -> list[tuple[str, int]]:
    chosen, seen = [], dict[int, int]()
    for path, label in samples:
        seen[label] = seen.get(label, 0) + 1
        if (seen[label] % 5 == 0) == (split == "val"):
            chosen.append((path, label))
    return chosen
