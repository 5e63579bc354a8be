# SPDX-License-Identifier: Apache-2.0
"""RPN and mask heads with involutions, as MMDetection builds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet")

from mmdet.registry import MODELS

import ic_conv.openmmlab  # noqa: F401
from ic_conv.layers import Involution2d

RPN: dict[str, Any] = {
    "in_channels": 32,
    "feat_channels": 32,
    "anchor_generator": {
        "type": "AnchorGenerator",
        "scales": [8],
        "ratios": [0.5, 1.0, 2.0],
        "strides": [4, 8],
    },
    "bbox_coder": {"type": "DeltaXYWHBBoxCoder"},
    "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
}
MASK = {"in_channels": 32, "conv_out_channels": 32, "num_classes": 3}


def build(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return MODELS.build({"type": kind, **options})


def image(size: int = 14) -> Tensor:
    return torch.randn(2, 32, size, size, generator=torch.Generator().manual_seed(1))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_rpn_is_an_involution_relu_and_two_1x1_convolutions() -> None:
    head = build("InvolutionRPNHead", **RPN).eval()
    assert isinstance(head.rpn_conv, Involution2d) and head.rpn_conv.kernel_size == (7, 7)
    features = head.rpn_conv(image()).relu()
    (scores, more_scores), (deltas, _) = head([image(), image(7)])
    assert torch.equal(scores, head.rpn_cls(features)) and torch.equal(deltas, head.rpn_reg(features))
    assert more_scores.shape == (2, 3, 7, 7)


def test_rpn_of_several_convolutions() -> None:
    head = build("InvolutionRPNHead", **RPN, num_convs=2, conv_cfg={"type": "CVolution2d", "kernel_size": 5})
    assert [type(module.conv).__name__ for module in head.rpn_conv] == ["ConvCVolution2d"] * 2
    assert head([image()])[0][0].shape == (2, 3, 14, 14)


def test_mask_head_is_involutions_with_relus() -> None:
    head = build("InvolutionFCNMaskHead", **MASK).eval()
    x = image()
    for module in head.convs:
        assert isinstance(module.conv, Involution2d) and module.conv.kernel_size == (7, 7)
        x = module.conv(x).relu()
    expected = head.conv_logits(head.upsample(x).relu())
    assert len(head.convs) == 4 and torch.equal(head(image()), expected)


@pytest.mark.parametrize("prefix", ["", "roi_head.mask_head."])
def test_published_mask_head_loads(prefix: str) -> None:
    source, head = build("InvolutionFCNMaskHead", **MASK), build("InvolutionFCNMaskHead", **MASK)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = {prefix + name.replace(".conv.", ".0.", 1): x for name, x in source.state_dict().items()}
    assert f"{prefix}convs.0.0.conv1.conv.weight" in state
    holder: nn.Module = head
    if prefix:
        holder = nn.ModuleDict({"roi_head": nn.ModuleDict({"mask_head": head})})
    holder.load_state_dict(state)
    for x, y in zip(head.parameters(), source.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("kind", "options", "convolutions"),
    [
        ("RPNHead", RPN | {"in_channels": 256, "feat_channels": 256}, 1),
        ("FCNMaskHead", {"in_channels": 256, "conv_out_channels": 256, "num_classes": 80}, 4),
    ],
)
def test_published_size(kind: str, options: Any, convolutions: int) -> None:
    """Each convolution with 256 * 256 * 9 + 256 parameters becomes an involution with these."""
    involution = 256 * 64 + 2 * 64 + 64 * 16 * 49 + 16 * 49
    saved = convolutions * (256 * 256 * 9 + 256 - involution)
    assert parameters(build(kind, **options)) - parameters(build(f"Involution{kind}", **options)) == saved


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("InvolutionRPNHead", RPN | {"feat_channels": 64}),
        ("InvolutionFCNMaskHead", MASK | {"in_channels": 64}),
    ],
)
def test_other_channels_are_an_error(kind: str, options: Any) -> None:
    with pytest.raises(ValueError, match="in_channels must equal out_channels; got"):
        build(kind, **options)
