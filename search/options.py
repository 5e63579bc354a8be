# SPDX-License-Identifier: Apache-2.0
"""What a search is asked for; whatever cannot be is refused here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from search.arch import file_stem
from search.engine import TrainOptions
from search.refit import INITS, Init
from search.space import DilationSpace
from search.strategies import EDOStrategy, ParetoStrategy, Strategy

DIGITS = "digits"


@dataclass(frozen=True)
class SearchOptions:
    """What to search for, on which network and data.

    Args:
        train: how the supernet is trained, and the work folder.
        kernel: size of the supernet's kernels.
        base_kernel: size of the kernels that are dilated.
        arch: see `search.arch.build_network`.
        finder: the strategy, by default edo.
        finetune_steps: training steps before the validation score of each trial of the strategy pareto (of
            scattered digits, on as many images as the calibration has); 0: no score.
        init: what the network with the pattern starts from: ``scratch`` (no weights are written), ``crop`` or
            ``refit``, see `search.refit.warm_start`.
        searches: of the strategy edo, evenly spread over the supernet's training, the last one after it; the
            earlier ones narrow the kernels, see `search.narrowing`.
        data: ``digits``, or a folder with one folder of images per class.
        image_size: side of the images in pixels.
        calibration_images: images in the statistics pass.
        checkpoint: weights of a trained supernet; nothing is trained then.
        task_config: an OpenMMLab config whose backbone is the supernet, see `search.on_task`; it stands for
            arch, kernels and data, and needs the checkpoint that training it left.
        output: the pattern file; by default it lies in the work folder.
        skip_bad: leave out images that cannot be read instead of stopping.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    train: TrainOptions
    kernel: int = 9
    base_kernel: int = 3
    arch: str = "ic_resnet50"
    finder: Strategy = field(default_factory=EDOStrategy, repr=False)
    finetune_steps: int = 0
    init: Init = "scratch"
    searches: int = 1
    data: str = DIGITS
    image_size: int = 96
    calibration_images: int = 512
    checkpoint: str | None = None
    task_config: str | None = None
    output: Path | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.finetune_steps and not isinstance(self.finder, ParetoStrategy):
            raise ValueError(f"steps of fine-tuning are for the strategy pareto, got {self.strategy}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {self.init!r}")
        if self.init == "crop" and self.finder.needs_plain:
            raise ValueError(
                f"crop copies taps of a supernet, the strategy {self.strategy} has none; init can be refit"
            )
        if self.searches < 1:
            raise ValueError(f"searches must be at least 1, got {self.searches}")
        if self.searches > 1 and not (isinstance(self.finder, EDOStrategy) and self.trains):
            which = (
                "a checkpoint" if isinstance(self.finder, EDOStrategy) else f"the strategy {self.strategy}"
            )
            raise ValueError(
                f"searches on the way need edo's supernet in training, got {self.searches} with {which}"
            )
        if self.calibration_images < 1:
            raise ValueError(f"calibration images must be at least 1, got {self.calibration_images}")
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise ValueError(f"the checkpoint must exist, got {self.checkpoint}")

    @property
    def strategy(self) -> str:
        return self.finder.name

    @property
    def space(self) -> DilationSpace:
        return DilationSpace(self.kernel, self.base_kernel)

    @property
    def pattern_path(self) -> Path:
        return self.output or Path(self.train.work_dir) / f"{self.name}.json"

    @property
    def weights_path(self) -> Path:
        """The state dict of the network with the pattern, written unless it starts from scratch."""
        return self.pattern_path.with_suffix(".pt")

    @property
    def trains(self) -> bool:
        """Whether weights are needed, of the supernet or the plain network, that no checkpoint gives."""
        needed = self.finder.needs_supernet or self.finder.needs_plain or self.init != "scratch"
        return needed and self.checkpoint is None

    @property
    def front_path(self) -> Path:
        """The folder of the strategy pareto's patterns, figure and table."""
        return self.pattern_path.with_name(f"{self.pattern_path.stem}_front")

    @property
    def name(self) -> str:
        """What the files of this search are called."""
        return Path(self.task_config).stem if self.task_config else file_stem(self.arch, self.kernel)
