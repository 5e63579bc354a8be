# SPDX-License-Identifier: Apache-2.0
"""What a search is asked for; whatever cannot be is refused here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from search.arch import file_stem
from search.assignment import BranchLimits
from search.criteria import DEFAULT_CRITERION
from search.engine import TrainOptions
from search.refit import INITS, Init
from search.space import DilationSpace
from search.strategies import (
    STRATEGIES,
    EDOStrategy,
    GradientStrategy,
    ParetoOptions,
    ParetoStrategy,
    Strategy,
)
from search.strategies.gradient import DEFAULT_SHARES

DIGITS = "digits"


@dataclass(frozen=True)
class SearchOptions:
    """What to search for, on which network and data.

    Args:
        train: how the supernet is trained, and the work folder.
        kernel: size of the supernet's kernels.
        base_kernel: size of the kernels that are dilated.
        arch: see `search.arch.build_network`.
        strategy: a name of `search.STRATEGIES`.
        criterion: a name of `search.criteria.CRITERIA`, for the strategy edo.
        limits: sizes and number of a layer's branches, for the strategy edo.
        pareto: what the strategy pareto varies and optimises, and where its study lives.
        finetune_steps: training steps before each trial's validation score (of scattered digits, on as many
            images as the calibration has); 0: no score.
        init: what the network with the pattern starts from: ``scratch`` (no weights are written), ``crop`` or
            ``refit``, see `search.refit.warm_start`.
        moved_shares: of the strategy gradient, as is `validation_steps`.
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
    strategy: str = "edo"
    criterion: str = DEFAULT_CRITERION
    limits: BranchLimits = field(default_factory=BranchLimits)
    pareto: ParetoOptions = field(default_factory=ParetoOptions)
    finetune_steps: int = 0
    init: Init = "scratch"
    moved_shares: tuple[float, ...] = DEFAULT_SHARES
    validation_steps: int = 0
    data: str = DIGITS
    image_size: int = 96
    calibration_images: int = 512
    checkpoint: str | None = None
    task_config: str | None = None
    output: Path | None = None
    skip_bad: bool = False
    finder: Strategy = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {self.strategy!r}; known ones: {', '.join(STRATEGIES)}")
        made = EDOStrategy(self.criterion, self.limits)  # refuses unknown criteria, whatever the strategy
        if self.strategy != made.name and not self.limits.free:
            raise ValueError(f"limits of the branches are for the strategy edo, got {self.strategy}")
        finder: Strategy = made if self.strategy == made.name else STRATEGIES[self.strategy]()
        if isinstance(finder, ParetoStrategy):
            identity = {"finetune_steps": self.finetune_steps, "data": Path(self.data).name}
            finder = ParetoStrategy(replace(self.pareto, yardstick=self.criterion, identity=identity))
        elif self.finetune_steps or self.pareto != ParetoOptions():
            raise ValueError(f"options of a study are for the strategy pareto, got {self.strategy}")
        if isinstance(finder, GradientStrategy):
            finder = GradientStrategy(self.moved_shares, self.validation_steps)
            if self.init == "crop":
                raise ValueError(
                    "crop copies taps of a supernet, the strategy gradient has none; init can be refit"
                )
        elif self.moved_shares != DEFAULT_SHARES or self.validation_steps:
            raise ValueError(f"shares of moved channels are for the strategy gradient, got {self.strategy}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {self.init!r}")
        object.__setattr__(self, "finder", finder)
        if self.calibration_images < 1:
            raise ValueError(f"calibration images must be at least 1, got {self.calibration_images}")
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise ValueError(f"the checkpoint must exist, got {self.checkpoint}")

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
