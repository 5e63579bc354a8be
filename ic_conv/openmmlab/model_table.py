# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs of configs, and the tables that compare them with the published figures.

A table of `configs/README.md` has the columns ``config``, ``params (M)`` and ``FLOPs (G)`` (published),
``our params (M)`` and ``our FLOPs (G)``; `update` fills the last two in. What was not published is empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ic_conv import complexity
from ic_conv.openmmlab.runner import load_config

# (C, H, W) of the one image, as in the published tables.
INPUT_SIZES = {
    "mmpretrain": (3, 224, 224),
    "mmdet": (3, 800, 1280),
    "mmseg": (3, 1024, 2048),
    "mmpose": (3, 640, 640),
}
PARAMS_TOLERANCE, FLOPS_TOLERANCE = 0.005, 0.02
COLUMNS = ("params (M)", "FLOPs (G)", "our params (M)", "our FLOPs (G)")
PLAIN = "= plain"  # instead of a published figure: that of the same network without its pattern
_PROPOSALS = {"bbox": 1000, "mask": 100}  # of a detector's second stage


@dataclass(frozen=True)
class Size:
    """What a model costs, by the rule of the published tables.

    Attributes:
        params: parameters that are trained; frozen stages are not.
        flops: of one forward pass, as `ic_conv.complexity` counts them; of a detector's second stage for 1000
            boxes and 100 masks.
        mask_output: the part of `flops` in upsampling and logits of mask heads.
    """

    params: int
    flops: int
    mask_output: int = 0


def measure(config: Config) -> Size:
    """Counts a config's model, on meta tensors: nothing is computed, every size in seconds.

    Args:
        config: as `load_config` gives it.
    """
    scope = config.default_scope
    if scope not in INPUT_SIZES:
        raise ValueError(f"default_scope must be one of {', '.join(INPUT_SIZES)}; got {scope!r}")
    with DefaultScope.overwrite_default_scope(scope):
        model = _build(config)
    cost = complexity.count(_Pass(model), INPUT_SIZES[scope])
    output = [
        layer.flops for layer in cost.layers if re.search(r"mask_head\..*(upsample|logits)", layer.name)
    ]
    params = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Size(params, cost.flops, sum(output))


def _build(config: Config) -> nn.Module:
    try:
        with torch.device("meta"):
            return MODELS.build(config.model)
    except RuntimeError:  # a constructor that computes with tensors
        return MODELS.build(config.model).to("meta")


class _Pass(nn.Module):
    """One image through all that has weights: what a test does, with a fixed number of boxes and masks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        if not hasattr(self.model, "roi_head"):
            return self.model(x, data_samples=None, mode="tensor")
        outputs = [self.model.rpn_head(self.model.extract_feat(x))]
        roi_head = self.model.roi_head
        for name, number in _PROPOSALS.items():
            if getattr(roi_head, f"with_{name}"):
                extractors = _several(getattr(roi_head, f"{name}_roi_extractor"))
                for head, extractor in zip(
                    _several(getattr(roi_head, f"{name}_head")), extractors, strict=True
                ):
                    size = extractor.roi_layers[0].output_size
                    outputs.append(head(x.new_zeros(number, extractor.out_channels, *size)))
        return outputs


def _several(module: nn.Module) -> Iterable[Any]:
    return module if isinstance(module, nn.ModuleList) else (module,)


def update(
    text: str, folder: Path, wanted: Callable[[str], bool] = lambda config: True
) -> tuple[str, list[str]]:
    """Measures the configs in a text's tables anew.

    Args:
        text: of the README.
        folder: where relative configs start.
        wanted: which configs to measure; other rows stay.

    Returns:
        The text with new figures, and a line for each figure that misses the published one by more than
        0.5 % (parameters) or 2 % (FLOPs) in a row without a footnote.
    """
    lines, problems = text.splitlines(keepends=True), []
    for number, header, cells in _rows(lines):
        row = dict(zip(header, cells, strict=True))
        link = re.search(r"\]\((.+?\.py)\)|`(\w+::.+?\.py)`", row["config"])
        if link is None or not wanted(link[1] or link[2]):
            continue
        name = link[1] or link[2]
        config = load_config(folder / name) if link[1] else _library_config(link[2])
        size = measure(config)
        params, flops = f"{size.params / 1e6:.2f}", f"{size.flops / 1e9:.2f}"
        if size.mask_output:
            flops += f" ({(size.flops - size.mask_output) / 1e9:.2f})"
        row |= {"our params (M)": params, "our FLOPs (G)": flops}
        lines[number] = f"| {' | '.join(row[key] for key in header)} |\n"
        if not re.search(r"\[\w\]", row["config"]):
            problems += [f"{name}: {problem}" for problem in _misses(row, size, config)]
    return "".join(lines), problems


def _rows(lines: list[str]) -> Iterator[tuple[int, list[str], list[str]]]:
    """Line number, header and cells of each row of the tables that have the columns."""
    header: list[str] = []
    for number, line in enumerate(lines):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif set(COLUMNS) < set(header) and not set(line) <= set("|-: \n"):
            yield number, header, cells


def _library_config(name: str) -> Config:
    """A config of an installed library: ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``."""
    library, _, path = name.partition("::")
    package = Path(__import__(library).__file__ or "").parent
    return load_config(package / ".mim" / "configs" / path)


def _misses(row: dict[str, str], size: Size, config: Config) -> Iterator[str]:
    if row["params (M)"] == PLAIN:
        config.model.backbone.pattern = None
        plain = measure(config)
        if plain != size:
            yield f"must cost what the plain network does, {plain}; got {size}"
        return
    for key, ours, unit, tolerance in (
        ("params (M)", [size.params], 1e6, PARAMS_TOLERANCE),
        ("FLOPs (G)", [size.flops, size.flops - size.mask_output], 1e9, FLOPS_TOLERANCE),
    ):
        if not row[key]:
            continue
        published = float(row[key]) * unit
        if min(abs(value - published) for value in ours) > tolerance * published:
            yield f"{key} must be within {tolerance:.1%} of {row[key]}; got {ours[0] / unit:.2f}"
