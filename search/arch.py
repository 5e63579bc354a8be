# SPDX-License-Identifier: Apache-2.0
"""Networks by name: those of `ic_conv.models`, or any factory of the user's."""

from __future__ import annotations

import importlib
import re
from typing import Any

from torch import nn

import ic_conv.models

ALL_STAGES = (0, 1, 2, 3)


def known_archs() -> list[str]:
    """Names that need no module path."""
    return [name for name in ic_conv.models.__all__ if re.match(r"(ic_resnex?t|rednet|cednet)\d", name)]


def build_network(arch: str, num_classes: int | None = None) -> nn.Module:
    """A plain network to search dilations for.

    Args:
        arch: a name of `known_archs`, or ``package.module:factory``, where factory takes no argument.
        num_classes: None gives a known network that returns the feature maps of its four stages, a number
            one that returns so many logits. A factory's network is taken as it comes.

    Raises:
        ValueError: unknown name, module or factory, or a factory that gives no nn.Module.
    """
    if ":" not in arch:
        if arch not in known_archs():
            known = ", ".join(known_archs())
            raise ValueError(f"unknown arch {arch!r}; give package.module:factory, or one of {known}")
        options: dict[str, Any] = {"num_classes": num_classes} if num_classes else {"out_indices": ALL_STAGES}
        return getattr(ic_conv.models, arch)(**options)
    module_name, _, name = arch.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import the arch {arch!r}: {error}") from error
    try:
        network = factory()
    except TypeError as error:
        raise ValueError(f"the factory of arch {arch!r} must work without arguments: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"the factory of arch {arch!r} must give a torch.nn.Module, got {type(network).__name__}"
        )
    return network


def file_stem(arch: str, kernel: int) -> str:
    """Name of an arch's files: ``ic_resnet50_k9``."""
    return f"{arch.rpartition(':')[2].rpartition('.')[2]}_k{kernel}"
