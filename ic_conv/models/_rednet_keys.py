# SPDX-License-Identifier: Apache-2.0
"""The keys of the published RedNet checkpoints, and ours.

Below their prefixes the keys are the same: ``backbone.stem.0.conv.weight`` is our ``stem.0.conv.weight``,
``head.fc.weight`` our ``fc.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ic_conv.checkpoint import without_prefix

BACKBONE, CLASSIFIER = "backbone.", "head.fc."


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a published classifier, detector or segmenter as a RedNet's; necks and heads but the
    classifier are left out, and a RedNet's own state dict stays as it is."""
    renamed = {
        f"{BACKBONE}fc.{key.removeprefix(CLASSIFIER)}" if key.startswith(CLASSIFIER) else key: value
        for key, value in state.items()
    }
    return without_prefix(renamed, "layer1.0.conv1.weight")


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A RedNet's state dict with the published keys, which have no place for a dilation pattern."""
    return {
        CLASSIFIER + key.removeprefix("fc.") if key.startswith("fc.") else BACKBONE + key: value
        for key, value in state.items()
        if not key.endswith(".group_dilations")
    }
