# SPDX-License-Identifier: Apache-2.0
"""Optuna studies that several processes and machines work on, and that outlive any of them."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
import torch.multiprocessing
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from search._repeatable import RepeatableSampler
from search.storage import NO_STORAGE, open_storage, without_password

SAMPLERS = ("nsga2", "tpe")
PRUNERS = ("none", "median", "halving")
POPULATION = 24  # of NSGA-II: a few generations within a hundred trials
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_OPTIONS, _OWNER, _ERROR = "options", "owner", "error"
Objective = Callable[[Trial], tuple[float, ...]]
Directions = Sequence[Literal["minimize", "maximize"]]


@dataclass(frozen=True)
class StudyOptions:
    """Where a study lives and how it is worked on.

    Args:
        storage: ``none`` (memory), the path of a journal file, or a URL: ``sqlite:///study.db``,
            ``postgresql://user:password@host/database``.
        name: of the study within the storage.
        sampler: ``nsga2`` or ``tpe``.
        pruner: ``none``, ``median`` or ``halving``: which trials that report values stop early.
        trials: finished trials at which the study ends, whichever process ran them; a killed process's trial
            is not one. Processes that end together may make a few more.
        jobs: processes of this machine.

    Raises:
        ValueError: an option is out of range, or several processes are to share a study in memory.
    """

    storage: str = NO_STORAGE
    name: str = "pareto"
    sampler: str = "nsga2"
    _: KW_ONLY
    pruner: str = "none"
    trials: int = 100
    jobs: int = 1

    def __post_init__(self) -> None:
        for name in ("trials", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {self.sampler!r}")
        if self.pruner not in PRUNERS:
            raise ValueError(f"pruner must be one of {', '.join(PRUNERS)}; got {self.pruner!r}")
        if self.jobs > 1 and self.storage == NO_STORAGE:
            raise ValueError(f"{self.jobs} jobs need a storage that they can share, got storage none")


def open_study(
    options: StudyOptions, directions: Directions, identity: Mapping[str, Any], seed: int | None = None
) -> Study:
    """Makes the study, or joins the one that is there.

    Args:
        directions: ``minimize`` or ``maximize`` for each objective.
        identity: what must be equal in all processes; plain JSON values.
        seed: of the draws; None: they differ each time.

    Raises:
        ValueError: the storage cannot be reached, or holds a study of this name with another identity.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # failed trials are told at the end
    storage = open_storage(options.storage)
    try:
        study = optuna.create_study(storage=storage, study_name=options.name, directions=list(directions))
        study.set_user_attr(_OPTIONS, identity)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=options.name)
        _check_identity(study, identity, options)
    if len(study.directions) != len(directions):
        raise ValueError(
            f"the study {options.name} has {len(study.directions)} objectives, now there are "
            f"{len(directions)}; choose another study name or storage"
        )
    samplers: dict[str, Callable[..., BaseSampler]] = {
        "nsga2": partial(optuna.samplers.NSGAIISampler, population_size=POPULATION),
        "tpe": optuna.samplers.TPESampler,
    }
    study.sampler = RepeatableSampler(samplers[options.sampler], seed, _killed)
    pruners: dict[str, Any] = {
        "median": optuna.pruners.MedianPruner,
        "halving": optuna.pruners.SuccessiveHalvingPruner,
    }
    study.pruner = pruners.get(options.pruner, optuna.pruners.NopPruner)()
    return study


def check_study(options: StudyOptions, identity: Mapping[str, Any]) -> None:
    """That the storage can be reached and holds no other study of this name; makes no study.

    Args:
        identity: as far as it is known already.

    Raises:
        ValueError: see `open_study`.
    """
    path = Path(options.storage)
    if options.storage == NO_STORAGE or ("://" not in options.storage and not path.exists()):
        return  # `open_storage` makes it
    storage = open_storage(options.storage)
    if options.name in optuna.get_all_study_names(storage):
        _check_identity(optuna.load_study(storage=storage, study_name=options.name), identity, options)


def _check_identity(study: Study, identity: Mapping[str, Any], options: StudyOptions) -> None:
    for _ in range(50):  # who made the study is about to write them
        if (made := study.user_attrs.get(_OPTIONS)) is not None:
            break
        time.sleep(0.1)
    for key, wanted in json.loads(json.dumps(identity)).items():
        if (other := (made or {}).get(key)) != wanted:
            raise ValueError(
                f"the study {options.name} in {without_password(options.storage)} was made with other "
                f"options: {key} {other!r}, now {wanted!r}; choose another study name or storage"
            )


def work_on(
    study: Study,
    objective: Objective,
    options: StudyOptions,
    identity: Mapping[str, Any],
    report: Callable[[int], None] = lambda finished: None,
) -> None:
    """Runs trials until the study has as many finished ones as the options say.

    A trial that fails is recorded as failed, with its error, and the study goes on. Trials that processes
    of this machine left behind when they were killed are recorded as failed too.

    Args:
        objective: called with an Optuna trial; it must be picklable when there are several jobs.
        identity: see `open_study`.
        report: called with the number of finished trials, again and again.

    Raises:
        RuntimeError: every process died before the study's end.
    """
    abandon_dead(study)
    if options.jobs == 1:
        _run(study, objective, options.trials, report)
    else:
        directions = [direction.name.lower() for direction in study.directions]
        # Workers begin as copies of a process that has imported what they need.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, type(objective).__module__])
        workers = [
            context.Process(
                target=_worker, args=(objective, options, directions, identity, index), daemon=True
            )
            for index in range(options.jobs)
        ]
        with _running(workers):
            while any(worker.is_alive() for worker in workers):
                report(finished(study))
                time.sleep(0.2)
        abandon_dead(study)
        if finished(study) < options.trials:
            codes = ", ".join(str(worker.exitcode) for worker in workers)
            raise RuntimeError(f"all processes ended before the study did, with exit codes {codes}")
    report(finished(study))


def finished(study: Study) -> int:
    """Number of trials that are complete, pruned or failed, those of killed processes left out."""
    return sum(not _killed(trial) for trial in study.get_trials(deepcopy=False, states=FINISHED))


def failures(study: Study) -> list[str]:
    """The failed trials and why they failed, one line each."""
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return [
        f"trial {trial.number}: {trial.user_attrs.get(_ERROR, 'its process was killed')}" for trial in failed
    ]


def abandon_dead(study: Study) -> None:
    """Records as failed what processes of this machine ran that are no more."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, pid = trial.user_attrs.get(_OWNER, (None, 0))
        if host == socket.gethostname() and not _alive(pid):
            with suppress(ValueError):  # another process was quicker
                study.tell(trial.number, state=TrialState.FAIL)


def front(study: Study) -> list[FrozenTrial]:
    """The complete trials that no other one beats in every objective, each point once, by first objective."""
    best = sorted(study.best_trials, key=lambda trial: (trial.values, trial.number))
    return list({tuple(trial.values): trial for trial in reversed(best)}.values())[::-1]


def _run(study: Study, objective: Objective, trials: int, report: Callable[[int], None]) -> None:
    def step(trial: Trial) -> tuple[float, ...]:
        trial.set_user_attr(_OWNER, [socket.gethostname(), os.getpid()])
        try:
            return objective(trial)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr(_ERROR, f"{type(error).__name__}: {error}")
            raise

    def count(study: Study, trial: FrozenTrial) -> None:
        done = finished(study)
        report(done)
        if done >= trials:
            study.stop()

    if finished(study) < trials:
        study.optimize(step, callbacks=[count], catch=(Exception,))


def _worker(
    objective: Objective,
    options: StudyOptions,
    directions: Directions,
    identity: Mapping[str, Any],
    index: int,
) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))
    study = open_study(options, directions, identity)
    with suppress(KeyboardInterrupt):
        _run(study, objective, options.trials, lambda finished: None)


@contextmanager
def _running(workers: Sequence[Any]) -> Iterator[None]:
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _killed(trial: FrozenTrial) -> bool:
    """Whether it ended with its process, not by an error of its own."""
    return trial.state == TrialState.FAIL and _ERROR not in trial.user_attrs


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
