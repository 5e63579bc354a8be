# SPDX-License-Identifier: Apache-2.0
"""The dilation search as a part of the training: of a detector, segmenter, pose estimator or classifier.

When it searches stands here, what it does then in `search.in_runner`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop

from ic_conv.layers import ICConv2d
from ic_conv.openmmlab._runner_parts import backbone_of, progress_of, save_again

if TYPE_CHECKING:
    from search.refit import Init


@HOOKS.register_module()
class DilationSearchHook(Hook):
    """Searches a pattern while a network trains, and goes on with the network that has it.

    At the last search the backbone's layers become `ICConv2d`, with the weights that they have; momentum and
    whatever else the optimizer keeps per weight goes along, and so do averaged models. Pattern and meta go to
    the work folder, ``pattern.json``.

    The backbone is a supernet. Of several searches the earlier ones leave each channel a share of its
    candidates, and taps that none of them reads stay zero from then on. Or it is any plain network with 3x3
    convolutions, for the strategy gradient, which searches once: half of the channels move to a dilation and
    keep their weights. Frozen layers stay plain. A search computes in the weights' own precision, also where
    the training is in mixed precision.

    A training that goes on from a checkpoint, and a test, take up the layers that the checkpoint has. If the
    training is stopped early (EarlyStoppingHook), a supernet is searched at that end; a plain network, which
    would have to train on, stays as it is.

    Args:
        at: epochs after which to search, in ascending order, or iterations of a training that counts these;
            by default the end of the training. A plain network has one search, early: an eighth of the
            training is what was measured.
        strategy: a name of `search.STRATEGIES`; it says whether the backbone must be plain or a supernet.
        criterion: of the strategy edo.
        init: of a supernet's layers: ``"refit"`` fits the kept taps to its output, ``"crop"`` copies them.
            Batch norms are estimated anew in any case.
        calibration_batches: of the training data, as its pipeline makes them.
        seed: of their choice, and of the strategy.
        kernel_size: of the large kernels that hold a plain network's dilations, by default 9; 9 gives 16
            candidate dilations, 13 gives 36. A supernet has its own.
        options: of the strategy: arguments of its class in `search.strategies`, as in
            ``dict(shares=(0.25,))`` for gradient. Of an option that is a dataclass, a dict of what differs
            from the default: ``dict(limits=dict(channel_multiple=16))`` for edo.

    Raises:
        ValueError: an option is unknown or out of range, or the backbone is not what the strategy needs.

    Example:
        >>> custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
        >>> custom_hooks = [dict(type="DilationSearchHook", at=[4, 8])]  # with a SuperResNet
        >>> custom_hooks = [dict(type="DilationSearchHook", strategy="gradient", at=2)]  # with an ICResNet
    """

    priority = "ABOVE_NORMAL"  # before EMAHook, whose model must change before it loads or averages

    def __init__(
        self,
        at: int | Sequence[int] | None = None,
        strategy: str = "edo",
        criterion: str = "energy",
        init: Init = "refit",
        calibration_batches: int = 32,
        seed: int = 0,
        kernel_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        from search.in_runner import BackboneSearch

        self.at = None if at is None else (at,) if isinstance(at, int) else tuple(at)
        self.search = BackboneSearch(
            strategy, criterion, init, calibration_batches, seed, kernel_size, options or {}
        )
        if self.at is not None and (not self.at or min(self.at) < 1 or sorted(set(self.at)) != [*self.at]):
            raise ValueError(f"at must name epochs or iterations from 1 on, ascending; got {list(self.at)}")
        if self.search.space is not None and (self.at is None or len(self.at) > 1):
            raise ValueError(f"the strategy {strategy} searches once: at must name when, got {at}")
        if len(self.at or ()) > 1 and strategy != "edo":
            raise ValueError(f"searches on the way rank candidates, as the strategy edo does; got {strategy}")

    def before_run(self, runner: Any) -> None:
        """Whatever cannot work is said before the first step."""
        training = isinstance(runner._train_loop, BaseLoop)
        if not self.search.open_layers(runner):
            backbone = backbone_of(runner.model)
            found = any(isinstance(module, ICConv2d) for module in backbone.modules())
            if found and not (training and runner.iter == 0):
                return  # a test of what was trained in this process
            got = type(backbone).__name__ + " with a pattern" * found
            raise ValueError(f"DilationSearchHook: model.backbone must be {self.search.needs}, got {got}")
        if training:
            unit, _, last = progress_of(runner)
            if self.at is not None and self.at[-1] > last:
                raise ValueError(
                    f"DilationSearchHook: at must lie within the training's {last} {unit}, got {self.at[-1]}"
                )
            self.search.check(runner)

    def before_train(self, runner: Any) -> None:
        unit, done, last = progress_of(runner)
        due = (self.at or (last,))[-1]
        if due <= done and self.search.open_layers(runner):
            runner.logger.warning(
                f"DilationSearchHook: the last search was due after {due} {unit}, {done} are done; "
                "the network stays as it is"
            )
        elif self.at is not None and self.at[0] <= done and self.search.open_layers(runner):
            self.search.stay_narrow(runner)

    def after_train_epoch(self, runner: Any) -> None:
        self._search_if_due(runner, "epochs")

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._search_if_due(runner, "iterations")

    def after_train(self, runner: Any) -> None:
        """The last search of a training that was stopped before it; what it finds is saved and validated."""
        unit, done, last = progress_of(runner)
        due = (self.at or (last,))[-1]
        if done >= due or not self.search.open_layers(runner):
            return
        stopped = f"the training stopped after {done} {unit}, the last search was due after {due}"
        if self.search.space is not None:
            runner.logger.warning(f"DilationSearchHook: {stopped}; the network stays plain")
            return
        runner.logger.info(f"{stopped}: dilation search now")
        self.search.finish(runner, {unit: done})
        save_again(runner)
        if runner.val_loop is not None:
            runner.val_loop.run()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Makes the layers that the checkpoint's weights are for, before these are loaded."""
        self.search.take_up(runner, checkpoint.get("state_dict", checkpoint))

    def _search_if_due(self, runner: Any, unit: str) -> None:
        """Called after each epoch and each iteration, before it counts as done."""
        counted, before, last = progress_of(runner)
        at, done = self.at or (last,), before + 1
        if unit != counted or done not in at or not (layers := self.search.open_layers(runner)):
            return
        runner.logger.info(f"dilation search after {done} {unit}, in {len(layers)} layers")
        if done == at[-1]:
            self.search.finish(runner, {unit: done})
        else:
            self.search.narrow(runner, at.index(done) + 1, len(at))
