# SPDX-License-Identifier: Apache-2.0
"""State dicts between the layouts that the authors of IC-Conv and Involution published and ours.

A published inception convolution is one convolution per branch (``conv_list.0.weight``), ours has one weight
and tells its dilations (``weight``, ``branches``). Published RedNets have our keys below ``backbone.`` and
``head.``; the involutions of their mask heads stand in a Sequential.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ic_conv.checkpoint import pattern_of, without_prefix
from ic_conv.models import _rednet_keys
from ic_conv.pattern import DilationPattern

_ANCHOR = "layer1.0.conv1.weight"  # stands in every backbone


def to_ours(state: Mapping[str, Tensor], pattern: DilationPattern | None = None) -> dict[str, Tensor]:
    """A published state dict in our layout, under the same prefixes; one in our layout stays as it is.

    Args:
        state: of a backbone, or of a whole classifier, detector, segmenter or pose estimator.
        pattern: the dilations of the inception convolutions, which the published layout does not tell.

    Raises:
        ValueError: the pattern is missing or belongs to another network.
    """
    parts: dict[str, dict[str, list[Tensor]]] = {}
    ours: dict[str, Tensor] = {}
    for key, value in _without_module(state).items():
        if match := re.fullmatch(r"(.+)\.conv_list\.\d+\.(weight|bias)", key):
            parts.setdefault(match[1], {}).setdefault(match[2], []).append(value)
            ours[f"{match[1]}.{match[2]}"] = value  # keeps the place
        else:
            ours[re.sub(r"(mask_head\.(?:\d+\.)?convs\.\d+)\.0\.", r"\1.conv.", key)] = value
    if not parts:
        return ours
    if pattern is None:
        raise ValueError("the published layout does not tell the dilations: a pattern must be given")
    if len(pattern.layers) != len(parts):
        raise ValueError(
            f"the pattern must have {len(parts)} layers, as the weights; got {len(pattern.layers)}"
        )
    for (name, tensors), layer in zip(parts.items(), pattern.layers, strict=True):
        channels = [len(part) for part in tensors["weight"]]
        counts = [count for _, count in layer.branches]
        if channels != [count * sum(channels) / layer.units for count in counts]:  # a count may be of groups
            raise ValueError(
                f"{name}: the pattern must have the branches of the weights, {channels}; got {counts}"
            )
        ours |= {f"{name}.{kind}": torch.cat(values) for kind, values in tensors.items()}
        ours[f"{name}.branches"] = torch.tensor([(dy, dx, count) for (dy, dx), count in layer.branches])
    return ours


def to_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], DilationPattern | None]:
    """A state dict of ours in the published layout, and the pattern that this layout does not tell.

    Raises:
        ValueError: the network does what the published ones cannot: dilated involutions, or channels that a
            layer puts back into their original order.
    """
    for key in state:
        if key.endswith((".group_dilations", ".output_order", ".input_order")):
            raise ValueError(f"the published layout has no place for {key}")
    published: dict[str, Tensor] = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        rows = state.get(f"{name}.branches")
        if kind == "branches":
            continue
        if rows is not None and kind in ("weight", "bias"):
            counts = rows[:, 2]
            sizes = (counts * (len(value) // int(counts.sum()))).tolist()
            for index, part in enumerate(value.split(sizes)):
                published[f"{name}.conv_list.{index}.{kind}"] = part.clone()
        else:
            published[re.sub(r"(mask_head\.(?:\d+\.)?convs\.\d+)\.conv\.", r"\1.0.", key)] = value
    if "stem.0.conv.weight" in published:  # a RedNet alone, whose published keys are a classifier's
        published = _rednet_keys.to_published(published)
    return published, pattern_of(without_prefix(state, _ANCHOR))


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a model, and its classifier if it has one, with the keys of `ic_conv.models`."""
    return _rednet_keys.from_published(state)


def _without_module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that a data-parallel wrapper adds."""
    wrapped = all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in state.items()}
