# SPDX-License-Identifier: Apache-2.0
"""What the backbones share: OpenMMLab's options around a network of `ic_conv.models`."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner.checkpoint import CheckpointLoader, get_torch_safe_globals
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recomputed

from ic_conv import _pattern_file, checkpoint
from ic_conv.convert import replace_modules
from ic_conv.models.rednet import _check_windows
from ic_conv.openmmlab._lazy import require
from ic_conv.pattern import DilationPattern, LayerPattern

ALL_STAGES = (0, 1, 2, 3)
PatternConfig = str | os.PathLike[str] | Sequence[Mapping[str, int]] | None
T = TypeVar("T")

# What ResNets of the libraries let one choose and these networks do not: inherited configs name it.
FIXED: dict[str, Any] = {
    "in_channels": 3,
    "num_stages": 4,
    "strides": (1, 2, 2, 2),
    "dilations": (1, 1, 1, 1),
    "style": "pytorch",
    "deep_stem": False,
    "avg_down": False,
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Backbone(BaseModule):
    """The options that all backbones have; a subclass builds a network and calls `set_up`.

    Args:
        out_indices: stages (0 to 3) whose feature maps forward returns as a tuple.
        frozen_stages: 0 freezes the stem, n the first n stages too: no gradients, in evaluation mode. -1
            freezes nothing.
        norm_eval: keep all batch norms in evaluation mode while training.
        norm_cfg: ``dict(type="SyncBN", requires_grad=True)`` for example, any norm layer of MMCV; None is BN.
            Layers with fewer channels get fewer of GN's groups.
        with_cp: recompute each block in the backward pass instead of storing what it computed.
        init_cfg: as everywhere in MMEngine. ``dict(type="Pretrained", checkpoint=FILE, prefix="backbone.")``
            takes weights of this network, of a plain one (torchvision's keys), and the published ones, with
            or without a prefix; all must fit, but for the classifier's.
        fixed: options of the libraries' ResNets that have one value here (`FIXED`), so that inherited
            configs work.

    Raises:
        ValueError: an option, a pattern or weights that do not fit; the message names the config key.
    """

    transform_key = "backbone.pattern"

    def set_up(
        self,
        plain: Callable[[], nn.Module],
        transform: Callable[[nn.Module], object] | None = None,
        *,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        init_cfg: Any = None,
        **fixed: Any,
    ) -> None:
        """Makes the network, a plain one so far, what its options say.

        Args:
            plain: builds the plain network again, for weights that must be loaded before `transform`.
            transform: changes a plain network in place into the final one.
        """
        for key, value in fixed.items():
            if key not in FIXED:
                raise TypeError(f"backbone.{key}: {type(self).__name__} has no such option")
            one_of(tuple(value) if isinstance(value, list) else value, [FIXED[key]], key)
        one_of(frozen_stages, range(-1, 5), "frozen_stages")
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.init_cfg = copy.deepcopy(init_cfg)
        self._plain, self._transform = partial(_with_norms, plain, norm_cfg), transform
        set_norms(self, norm_cfg)
        if transform is not None:
            with config_key(self.transform_key):
                transform(self)
        if with_cp:
            for name, stage in list(self.named_children()):
                if name.startswith("layer"):
                    self.add_module(name, RecomputedStage(*stage))
        self._freeze()

    def _freeze(self) -> None:
        for name, child in self.named_children():  # the stem's layers, then layer1 to layer4
            if self.frozen_stages < 0 or name == f"layer{self.frozen_stages + 1}":
                break
            child.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Initialises as `init_cfg` says; weights that do not fit are an error, not a warning."""
        again, configs = self.is_init, self.init_cfg
        every = [configs] if isinstance(configs, Mapping) else list(configs or [])
        pretrained = [cfg for cfg in every if cfg["type"] in ("Pretrained", PretrainedInit)]
        self.init_cfg = [cfg for cfg in every if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = configs
        for cfg in [] if again else pretrained:
            with config_key("backbone.init_cfg"):
                self._load(cfg["checkpoint"], cfg.get("prefix"))

    def _load(self, source: str, prefix: str | None) -> None:
        state = read_checkpoint(source)
        if prefix:
            prefix = prefix.removesuffix(".") + "."
            state = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
            if not state:
                raise ValueError(f"{source}: no key starts with the prefix {prefix!r}")
        state = checkpoint.without_prefix(state, "layer1.0.conv1.weight")
        own = self.state_dict()
        state = {
            name: x
            for name, x in state.items()
            if not name.startswith("fc.") and (name in own or not name.endswith(STATISTICS))
        }
        _check_windows(self, state, source)
        final = self._is_final(state)
        if final and self._transform is None:
            raise ValueError(
                f"{source}: these weights belong to a dilation pattern; name it in backbone.pattern"
            )
        if final or self._transform is None:
            checkpoint.load_weights(self, state, source)
            return
        twin = self._twin(state)
        checkpoint.load_weights(twin, state, source)
        with config_key(source):
            self._transform(twin)
        self.load_state_dict(twin.state_dict())

    def _twin(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The network that these weights belong to; transformed, it is this one."""
        return self._plain()

    def _is_final(self, state: Mapping[str, Tensor]) -> bool:
        """Whether weights are those of the transformed network."""
        return any(
            name.endswith((".branches", ".group_dilations")) or ".conv_list." in name for name in state
        )


class RecomputedStage(nn.Sequential):
    """Blocks that are computed again in the backward pass, which saves the memory of what they compute."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.training and torch.is_grad_enabled():
                contexts = partial(_recomputing, block)
                x = recomputed(block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x)
        return x


def _recomputing(block: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _without_updates(block)


@contextmanager
def _without_updates(block: nn.Module) -> Iterator[None]:
    """Running statistics have seen this batch already when a block is computed for the second time."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def set_norms(network: nn.Module, norm_cfg: Mapping[str, Any] | None) -> None:
    """Replaces the batch norms in place, keeping scales and shifts."""
    if norm_cfg is None:
        return
    require("mmcv", "norm_cfg")
    from mmcv.cnn import build_norm_layer

    new = {}
    for name, old in network.named_modules():
        if isinstance(old, nn.BatchNorm2d):
            cfg = dict(norm_cfg)
            if "num_groups" in cfg:
                cfg["num_groups"] = math.gcd(cfg["num_groups"], old.num_features)
            new[name] = build_norm_layer(cfg, old.num_features)[1]
            new[name].load_state_dict(old.state_dict(), strict=False)
    replace_modules(network, new)


def _with_norms(plain: Callable[[], nn.Module], norm_cfg: Mapping[str, Any] | None) -> nn.Module:
    network = plain()
    set_norms(network, norm_cfg)
    return network


def read_checkpoint(source: str) -> dict[str, Tensor]:
    """The weights in a file, of MMEngine's checkpoints too, or at one of MMEngine's addresses."""
    if "://" in source:
        return checkpoint.read_weights(CheckpointLoader.load_checkpoint(source, map_location="cpu"))[0]
    with torch.serialization.safe_globals(get_torch_safe_globals()):
        return checkpoint.read_weights(Path(source).expanduser())[0]


def find_pattern(pattern: PatternConfig) -> DilationPattern | None:
    """The pattern that a config names by its file or writes out.

    Relative paths start in the working directory or, like ``pattern_zoo/...``, beside the package.
    """
    if pattern is None:
        return None
    with config_key("backbone.pattern"):
        if isinstance(pattern, str | os.PathLike):
            places = [Path(pattern).expanduser(), Path(__file__).parents[2] / pattern]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise ValueError(f"no pattern file {' or '.join(dict.fromkeys(map(str, places)))}")
            return DilationPattern.load(found)
        counts = [_pattern_file._layer_counts(layer, f"layer {i}") for i, layer in enumerate(pattern)]
        largest = max((max(dilation) for layer in counts for dilation in layer), default=2)
        return DilationPattern(tuple(map(LayerPattern.from_counts, counts)), kernel=2 * max(largest, 2) + 1)


def one_of(value: T, known: Sequence[T], key: str) -> T:
    """The value, if it is a known one."""
    if value not in known:
        choices = ", ".join(map(str, known))
        raise ValueError(f"backbone.{key}: must be one of {choices}; got {value!r}")
    return value


@contextmanager
def config_key(key: str) -> Iterator[None]:
    """Puts the config's key, or a file's name, in front of an error's message."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error
