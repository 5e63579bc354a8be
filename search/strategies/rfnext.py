# SPDX-License-Identifier: Apache-2.0
"""RF-Next (Gao et al., TPAMI 2023): one dilation per layer, searched by mmcv while the network trains."""

from __future__ import annotations

import copy

from torch import nn

from ic_conv.convert import replace_modules
from ic_conv.pattern import DilationPattern, LayerPattern
from search.strategies._training import batches_after, fit
from search.strategies.base import SearchTask, Strategy


class RFNextStrategy(Strategy):
    """mmcv's RFSearchHook on a copy of the plain network: each layer learns the weights of two dilations
    round its own, takes their mean at every update, and goes on round that.

    Args:
        steps: of the training.
        updates: of the dilations, evenly spread over the steps.
        expansion: a layer of dilation d tries d * (1 - expansion) and d * (1 + expansion), rounded.
        progress: show how far the training is.

    Raises:
        ValueError: there are fewer steps than updates, or the expansion does not lie between 0 and 1.
    """

    name = "rfnext"
    needs_plain = True

    def __init__(
        self, steps: int = 200, updates: int = 10, expansion: float = 0.5, progress: bool = False
    ) -> None:
        if not 1 <= updates <= steps:
            raise ValueError(f"updates must lie between 1 and the steps, got {updates} and {steps}")
        if not 0 < expansion <= 1:
            raise ValueError(f"the expansion must lie between 0 and 1, got {expansion}")
        self.steps, self.updates, self.expansion, self.progress = steps, updates, expansion, progress

    def check(self, task: SearchTask) -> None:
        try:
            import mmcv.cnn.rfsearch  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"the strategy rfnext needs mmcv, pip install onedl-mmcv==2.3.6: {error}"
            ) from error

    def search(self, task: SearchTask) -> DilationPattern:
        if task.plain is None:
            raise ValueError("the strategy rfnext needs a trained plain network, got none")
        self.check(task)
        from mmcv.cnn.rfsearch import Conv2dRFSearchOp, RFSearchHook

        rules = {
            "step": 0,
            "max_step": self.updates + 1,
            "search_interval": 1,
            "exp_rate": self.expansion,
            "init_alphas": 0.01,
            "mmin": 1,
            "mmax": task.space.max_dilation,
            "num_branches": 2,
            "skip_layer": None,
        }
        model, network = copy.deepcopy((task.plain.model, task.plain.network))
        layers: dict[str, nn.Module] = {
            name: Conv2dRFSearchOp(network.get_submodule(name), rules, verbose=False) for name in task.units
        }
        network = replace_modules(network, layers)
        hook = RFSearchHook("search", {"search": rules}, by_epoch=False, verbose=False)
        interval = self.steps // self.updates

        def update(step: int) -> None:
            if step and step % interval == 0:
                hook.estimate_and_expand(network)

        batches, steps = batches_after(task.plain, 0), self.updates * interval
        fit(model, task.plain, batches, steps, seed=task.seed, before_step=update, progress=self.progress)
        hook.estimate_and_expand(network)
        return DilationPattern(
            tuple(
                LayerPattern.from_counts({layer.op_layer.dilation: task.units[name]}, name)  # type: ignore[union-attr, dict-item]
                for name, layer in layers.items()
            ),
            task.space.kernel,
            task.space.base_kernel,
            {"search_steps": steps, "updates": self.updates},
        )
