# SPDX-License-Identifier: Apache-2.0
"""The backbones, with the options that OpenMMLab's users know from its ResNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from ic_conv.convert import apply_pattern
from ic_conv.layers import Involution2d
from ic_conv.models import cednet, rednet, resnet
from ic_conv.openmmlab._backbone import ALL_STAGES, Backbone, PatternConfig, find_pattern, one_of


@MODELS.register_module()
class ICResNet(resnet.ResNet, Backbone):
    """ResNet or ResNeXt with a dilation pattern, or the plain network without one.

    Pretrained weights may also be those of the supernet on which the pattern was found; they are cropped.

    Args:
        depth: 18, 34, 50, 101 or 152.
        pattern: a pattern file, or what stands in it. A relative path starts in the working directory or,
            like ``pattern_zoo/...``, beside the package.
        groups, base_width: 32 and 4 make a ResNeXt 32x4d, whose pattern counts groups.
        base_channels: of the stem and of the first stage; fewer than 64 make a slim network.
        num_stages: the first ones of the four; without the others, maps of small images are not as small.
        out_indices: stages (0 to 3) whose feature maps forward returns as a tuple.
        common: the options of `Backbone`.

    Shape:
        input (N, 3, H, W); output as that of `ic_conv.models.ResNet` with out_indices.

    Example:
        >>> backbone = dict(type="ICResNet", depth=50, pattern="pattern_zoo/detection/ic_resnet50_k9.json")
    """

    def __init__(
        self,
        depth: int,
        pattern: PatternConfig = None,
        *,
        groups: int = 1,
        base_width: int = 4,
        base_channels: int = 64,
        num_stages: int = 4,
        out_indices: Sequence[int] = ALL_STAGES,
        **common: Any,
    ) -> None:
        dilations = find_pattern(pattern)
        options = _resnet_options(depth, groups, base_width, base_channels, num_stages, out_indices)
        super().__init__(**options)
        transform = None if dilations is None else partial(apply_pattern, pattern=dilations, inplace=True)
        self.set_up(partial(resnet.ResNet, **options), transform, **common)

    def _twin(self, state: Mapping[str, Tensor]) -> nn.Module:
        plain = super()._twin(state)
        if (size := _kernel_size(state)) <= 3:
            return plain
        from search import convert_to_supernet

        return convert_to_supernet(plain, size, inplace=True)


@MODELS.register_module()
class SuperResNet(resnet.ResNet, Backbone):
    """The supernet of a ResNet, for a dilation search on the task itself.

    Pretrained weights are those of a supernet, or plain ones, which stand at the centre of the grown kernels.

    Args:
        depth, groups, base_width, base_channels, num_stages, out_indices, common: as in `ICResNet`.
        kernel_size: size of the grown 3x3 kernels; 9 gives 16 candidate dilations, 13 gives 36.

    Example:
        >>> backbone = dict(type="SuperResNet", depth=50, kernel_size=9)
    """

    transform_key = "backbone.kernel_size"

    def __init__(
        self,
        depth: int,
        kernel_size: int = 9,
        *,
        groups: int = 1,
        base_width: int = 4,
        base_channels: int = 64,
        num_stages: int = 4,
        out_indices: Sequence[int] = ALL_STAGES,
        **common: Any,
    ) -> None:
        from search import convert_to_supernet

        options = _resnet_options(depth, groups, base_width, base_channels, num_stages, out_indices)
        super().__init__(**options)
        grow = partial(convert_to_supernet, kernel_size=kernel_size, inplace=True)
        self.set_up(partial(resnet.ResNet, **options), grow, **common)
        self.kernel_size = kernel_size
        self._transform = partial(grow, init="inflate")

    def _is_final(self, state: Mapping[str, Tensor]) -> bool:
        return _kernel_size(state) == self.kernel_size


def _kernel_size(state: Mapping[str, Tensor]) -> int:
    """Of the searchable layers; 3 if they are missing, for the plain network to complain."""
    kernel = state.get("layer1.0.conv2.weight")
    return 3 if kernel is None else kernel.shape[-1]


def _resnet_options(
    depth: int, groups: int, base_width: int, base_channels: int, num_stages: int, out_indices: Sequence[int]
) -> dict[str, Any]:
    depths = {int(name.removeprefix("ic_resnet")): name for name in resnet.ARCHITECTURES if "x" not in name}
    block, layers, *_ = resnet.ARCHITECTURES[depths[one_of(depth, list(depths), "depth")]]
    width = 64 if groups == 1 else base_width
    return {
        "block": block,
        "layers": layers[: one_of(num_stages, range(1, 5), "num_stages")],
        "groups": groups,
        "width_per_group": width,
        "width": base_channels,
        "out_indices": out_indices,
    }


@MODELS.register_module()
class RedNet(rednet.RedNet, Backbone):
    """RedNet, a ResNet of involutions.

    Args:
        depth: 26, 38, 50, 101 or 152.
        pattern: as in `ICResNet`; its counts are groups of the involutions.
        kernel_size: window of the involutions.
        stem_kernel_size: window of the stem's involution, by default `kernel_size`; 3 in the published
            classifiers, 7 in the published detectors and segmenters.
        group_channels: channels that share a kernel.
        out_indices: stages (0 to 3) whose feature maps forward returns as a tuple.
        operator_cfg: further options of every involution: `reduction`, `kernel_generation`, `backend`.
        common: the options of `Backbone`.

    Shape:
        input (N, 3, H, W); output as that of `ic_conv.models.RedNet` with out_indices.

    Example:
        >>> backbone = dict(type="RedNet", depth=50, stem_kernel_size=3)
    """

    operator: type[nn.Module] = Involution2d

    def __init__(
        self,
        depth: int,
        pattern: PatternConfig = None,
        *,
        kernel_size: int = 7,
        stem_kernel_size: int | None = None,
        group_channels: int = 16,
        out_indices: Sequence[int] = ALL_STAGES,
        operator_cfg: Mapping[str, Any] | None = None,
        **common: Any,
    ) -> None:
        dilations = find_pattern(pattern)
        depths = {int(name.removeprefix("rednet")): layers for name, layers in rednet.BLOCKS.items()}
        options = {
            "layers": depths[one_of(depth, list(depths), "depth")],
            "operator": self.operator,
            "kernel_size": kernel_size,
            "stem_kernel_size": stem_kernel_size,
            "group_channels": group_channels,
            "out_indices": out_indices,
            **(operator_cfg or {}),
        }
        super().__init__(**options)
        transform = None if dilations is None else partial(rednet._with_pattern, pattern=dilations)
        self.set_up(partial(rednet.RedNet, **options), transform, **common)


@MODELS.register_module()
class CedNet(RedNet):
    """CedNet, a RedNet of C-volutions with 9x9 windows, 7x7 in the stem; options as in `RedNet`.

    Its `operator_cfg` may also hold `channel_reduction`.
    """

    operator = cednet.DEFAULTS["operator"]

    def __init__(self, depth: int, pattern: PatternConfig = None, **options: Any) -> None:
        windows = {key: cednet.DEFAULTS[key] for key in ("kernel_size", "stem_kernel_size")}
        super().__init__(depth, pattern, **(windows | options))
