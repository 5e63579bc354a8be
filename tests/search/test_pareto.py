# SPDX-License-Identifier: Apache-2.0
"""The study on the front of error and latency: objectives, processes, storages, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import FixedTrial, TrialState
from torch import nn

from ic_conv import DilationPattern
from search import SearchTask, convert_to_supernet
from search.assigned import AssignedLayers
from search.assignment import BranchLimits
from search.criteria import energy
from search.latency import Kind, LatencyTable, Row
from search.measure_latency import MeasuredLatency
from search.report import write_front
from search.statistics import collect
from search.strategies import FrontMember, ParetoOptions, ParetoStrategy, knee
from search.strategies.pareto import Objective
from search.study import StudyOptions, failures, finished, open_study, work_on

ROOT = Path(__file__).parents[2]
DIRECTIONS = ("minimize", "minimize")

# Functions for other processes, in a module that these can import.
MODULE = """
import time

def nap(pattern, trial):
    time.sleep(0.3)
    return 1.0

def moody(pattern, trial):
    if trial % 2:
        raise RuntimeError(f"no luck with {trial}")
    return float(trial)

def broken(pattern, trial):
    raise RuntimeError("never works")
"""


def small_task() -> SearchTask:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 32, 3, padding=1, groups=8)
    return SearchTask.of(convert_to_supernet(nn.Sequential(*layers), 9), [torch.randn(2, 3, 16, 16)])


def table(rest_ms: float = 1.0) -> LatencyTable:
    """A device on which each branch takes a millisecond."""
    kinds = {"0": Kind(3, 40, 1, 1, 16, 16), "2": Kind(40, 32, 8, 1, 16, 16)}
    rows = []
    for kind, units in zip(kinds.values(), (40, 8), strict=True):
        for count in range(1, 9):
            counts = [units // 8] * (count - 1) + [units - units // 8 * (count - 1)]
            branches = tuple(((1 + d // 4, 1 + d % 4), n) for d, n in enumerate(counts))
            rows.append(Row(kind, branches, float(count)))
    return LatencyTable("abacus", "small", 1, 1, 16, kinds, rest_ms, tuple(rows))


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "scores_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    return importlib.import_module("scores_of_a_test")


def small_objective(score: Any = None) -> Objective:
    return ParetoStrategy(ParetoOptions(table(), score=score)).objective(small_task())


def parameters(**changed: Any) -> dict[str, Any]:
    """Of the one stage of the small network."""
    chosen = {"channel_multiple": 1, "max_branches": 16, "dmax": 4, "criterion": "energy"} | changed
    return {f"network.{key}": value for key, value in chosen.items()}


def test_parameters_make_the_pattern() -> None:
    objective = small_objective()
    free = objective.pattern(FixedTrial(parameters()))
    moments = collect(small_task().supernet, small_task().batches(), small_task().space)  # type: ignore[arg-type]
    best = energy(moments["0"], small_task().space).numpy().argmin(1)
    assert [small_task().space.candidates[index] for index in best] == list(free.layers[0].assignment or ())
    narrow = objective.pattern(FixedTrial(parameters(dmax=2, max_branches=2, channel_multiple=8)))
    for layer in narrow.layers:
        assert layer.max_dilation <= 2 and len(layer.branches) <= 2
        assert all(count * (4 if layer.name == "2" else 1) % 8 == 0 for _, count in layer.branches)
    plain = objective.pattern(FixedTrial(parameters(dmax=1)))
    assert objective.error(plain) == pytest.approx(1.0)
    assert objective.error(free) < objective.error(narrow) < 1


def test_processes_find_what_others_have_assigned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = np.random.default_rng(0).random((24, 4))
    limits, other = (BranchLimits(multiple, max_branches=2).of_layer(24, 24) for multiple in (4, 8))
    candidates, path = [(1, 1), (1, 2), (2, 1), (2, 2)], tmp_path / "deep/layers.sqlite"
    first = AssignedLayers(path)
    found = first.assign(errors, candidates, limits, "a")
    first.save()
    monkeypatch.setattr("search.assigned.assign_within", None)
    for known in (first, AssignedLayers(path)):
        assert known.assign(errors, candidates, limits, "a") == found
    for question in (
        (errors + 1e-9, candidates, limits),
        (errors, candidates[::-1], limits),
        (errors, candidates, other),
    ):
        with pytest.raises(TypeError, match="NoneType"):
            AssignedLayers(path).assign(*question, "a")


def test_the_front_holds_what_nothing_beats() -> None:
    options = ParetoOptions(table(), study=StudyOptions(trials=30))
    front = ParetoStrategy(options).front(small_task())
    assert len(front) > 2
    points = np.array([[member.error, member.latency_ms] for member in front])
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) < 0).all()
    for member in front:
        branches = sum(len(layer.branches) for layer in member.pattern.layers)
        assert member.latency_ms == pytest.approx(1 + branches, rel=0.35)
        assert member.pattern.meta["values"] == [member.error, member.latency_ms]


def test_the_knee_is_near_the_best_of_all() -> None:
    pattern = DilationPattern.load(ROOT / "pattern_zoo/scattered_digits/ic_resnet18_k9.json")
    points = [(0.5, 9.0), (0.55, 4.0), (0.9, 3.0)]
    front = [FrontMember(pattern, index, *values) for index, values in enumerate(points)]
    assert knee(front).trial == 1 and knee(front[:1]).trial == 0


def test_the_front_s_files(tmp_path: Path) -> None:
    front = ParetoStrategy(ParetoOptions(table(), study=StudyOptions(trials=12))).front(small_task())
    (tmp_path / "trial_999.json").write_text("of an earlier front")
    write_front(front, knee(front), tmp_path, {"architecture": "small"})
    assert len(list(tmp_path.glob("trial_*.meta.json"))) == len(front)
    assert not (tmp_path / "trial_999.json").exists()
    again = DilationPattern.load(tmp_path / f"trial_{front[0].trial}.json")
    assert again == front[0].pattern and again.meta["architecture"] == "small"
    assert (tmp_path / "front.png").stat().st_size > 5000
    text = (tmp_path / "front.md").read_text()
    assert text.count("chosen") == 1 and len(text.splitlines()) == 2 + len(front)


def test_a_score_is_a_third_objective_and_failures_are_recorded(scores: Any) -> None:
    options = StudyOptions(trials=8)
    objective = small_objective(scores.moody)
    study = open_study(options, objective.directions, {}, seed=0)
    work_on(study, objective, options, {})
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL] * 4
    assert failures(study)[0] == "trial 1: RuntimeError: no luck with 1"
    assert [trial.values[2] for trial in study.trials[::2]] == [0.0, 2.0, 4.0, 6.0]
    task, nothing = small_task(), ParetoOptions(table(), score=scores.broken, study=StudyOptions(trials=2))
    with pytest.raises(ValueError, match="no trial succeeded: trial 0: RuntimeError: never works"):
        ParetoStrategy(nothing).front(task)


def test_four_processes_on_one_study(tmp_path: Path, scores: Any) -> None:
    options = StudyOptions(str(tmp_path / "study.journal"), trials=16, jobs=4)
    objective = small_objective(scores.nap)
    study = open_study(options, objective.directions, {})
    seen: list[int] = []
    work_on(study, objective, options, {}, seen.append)
    assert 16 <= finished(study) < 16 + 4 and seen == sorted(seen)
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    assert len({trial.user_attrs["owner"][1] for trial in study.trials}) == 4
    assert len({str(trial.params) for trial in study.trials}) > 8, "processes must not draw the same"


def test_a_killed_process_loses_its_own_trial_alone(tmp_path: Path, scores: Any) -> None:
    options = StudyOptions(str(tmp_path / "study.journal"), trials=20, jobs=4)
    objective = small_objective(scores.nap)
    study = open_study(options, objective.directions, {})
    work = threading.Thread(target=work_on, args=(study, objective, options, {}))
    work.start()
    watcher = open_study(options, objective.directions, {})
    deadline = time.monotonic() + 100
    while finished(watcher) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    before = {trial.number: trial.values for trial in watcher.trials if trial.state == TrialState.COMPLETE}
    running = [t for t in watcher.trials if t.state == TrialState.RUNNING and "owner" in t.user_attrs]
    victim = running[-1].user_attrs["owner"][1]
    os.kill(victim, signal.SIGKILL)
    work.join(timeout=100)
    assert not work.is_alive() and finished(watcher) >= 20
    trials = {trial.number: trial for trial in watcher.trials}
    assert before and all(trials[number].values == values for number, values in before.items())
    assert not [trial for trial in trials.values() if trial.state == TrialState.RUNNING]
    assert [line for line in failures(watcher) if "its process was killed" in line]


@pytest.mark.parametrize("storage", ["study.journal", "sqlite:///study.db"])
@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_a_study_goes_on_where_it_was(
    storage: str, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task, before = small_task(), []
    for trials in (3, 5):
        study = StudyOptions(storage, "mine", sampler, trials=trials)
        ParetoStrategy(ParetoOptions(table(), study=study)).front(task)
        stored = optuna.load_study(
            study_name="mine",
            storage=storage
            if "://" in storage
            else optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage)),
        )
        found = [(trial.values, trial.datetime_start) for trial in stored.trials]
        assert len(found) == trials and found[: len(before)] == before
        before = found
    with pytest.raises(ValueError, match=r"study mine in .*study\.\w+ was made with other options: latency"):
        ParetoStrategy(ParetoOptions(table(2.0), study=study)).check(task)
    with pytest.raises(ValueError, match="made with other options: criteria"):
        ParetoStrategy(ParetoOptions(table(), criteria=["energy"], study=study)).check(task)


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, which refuses to run as root."""
    pytest.importorskip("psycopg", reason="pip install 'ic-conv[postgresql]'")
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL's programs initdb and pg_ctl are not on the path")
    folder = Path(tempfile.mkdtemp())
    user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(folder, "nobody")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    control = [*user, "pg_ctl", "-D", str(folder / "data"), "-w"]
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    for command in (
        [*user, "initdb", "-D", str(folder / "data"), "-U", "me", "--auth=trust", "--no-sync"],
        [*control, "-o", options, "-l", str(folder / "log"), "start"],
    ):
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder)


def test_two_processes_on_a_postgresql_server(server: str) -> None:
    options = StudyOptions(server, trials=8, jobs=2)
    study = open_study(options, DIRECTIONS, {})
    work_on(study, small_objective(), options, {})
    assert 8 <= finished(study) < 8 + 2
    assert len({trial.user_attrs["owner"][1] for trial in study.trials}) == 2
    assert [trial.number for trial in study.trials] == list(range(len(study.trials)))


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("sqlite:////no/such/folder/study.db", "unable to open database"),
        ("postgresql://me:secret@localhost:1/studies", "postgresql://localhost:1/studies"),
        ("nonsense://x", "nonsense"),
        ("{file}/study.journal", "Not a directory|File exists"),
    ],
)
def test_a_storage_that_cannot_be_reached(storage: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = StudyOptions(storage.format(file=tmp_path / "file"))
    with pytest.raises(ValueError, match=message) as caught:
        open_study(options, DIRECTIONS, {})
    assert "that can be reached" in str(caught.value) and "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"sampler": "dice"}, "sampler must be one of nsga2, tpe; got 'dice'"),
        ({"jobs": 2}, "2 jobs need a storage that they can share"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyOptions(**options)


def test_what_does_not_fit_is_told_before_work_starts(tmp_path: Path) -> None:
    task = small_task()
    other = convert_to_supernet(nn.Conv2d(3, 8, 3, padding=1), 9)
    with pytest.raises(ValueError, match="the pattern has 1 layers, the network 2"):
        ParetoStrategy(ParetoOptions(table())).check(SearchTask.of(other))
    jobs = StudyOptions(str(tmp_path / "s.journal"), jobs=2)
    with pytest.raises(ValueError, match="latencies that 2 jobs measure disturb each other"):
        ParetoStrategy(ParetoOptions(study=jobs)).check(task)
    with pytest.raises(ValueError, match="unknown criterion 'magic'"):
        ParetoOptions(criteria=["magic"])
    with pytest.raises(ValueError, match="at least one criterion"):
        ParetoOptions(criteria=[])


def test_latency_can_be_measured() -> None:
    task = small_task()
    assert task.supernet is not None
    pattern = small_objective().pattern(FixedTrial(parameters()))
    assert MeasuredLatency(task.supernet, image_size=16)(pattern) > 0


NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
"""


def test_the_command_goes_on_after_kill_9_and_leaves_the_front(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(NETWORK)
    command = [sys.executable, str(ROOT / "tools/search.py"), "--arch", "mynet:tiny", "--work-dir", "run"]
    command += ["--steps", "2", "--calibration-images", "8", "--latency-image-size", "32", "--resume"]
    command += ["--strategy", "pareto", "--n-trials"]
    process = subprocess.Popen([*command, "100000"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    options = StudyOptions(str(tmp_path / "run/study.journal"), "tiny_k9")
    deadline = time.monotonic() + 100
    before: dict[int, Any] = {}
    while len(before) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        if Path(options.storage).exists():
            before = complete(options)
    process.kill()
    process.wait()
    before = complete(options)
    assert len(before) >= 3
    done = subprocess.run(
        [*command, str(len(before) + 3)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    after = complete(options)
    assert len(after) > len(before) and all(after[number] == before[number] for number in before)
    folder = tmp_path / "run/tiny_k9_front"
    assert (folder / "front.png").exists() and (folder / "front.md").exists()
    chosen = DilationPattern.load(tmp_path / "run/tiny_k9.json")
    assert chosen.meta["strategy"] == "pareto" and "supernet_sha256" in chosen.meta
    assert chosen == DilationPattern.load(folder / f"trial_{chosen.meta['trial']}.json")
    assert "| trial |" in done.stdout


def test_the_score_after_fine_tuning_is_the_third_objective(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(NETWORK)
    command = [sys.executable, str(ROOT / "tools/search.py"), "--arch", "mynet:tiny", "--work-dir", "run"]
    command += ["--steps", "2", "--calibration-images", "8", "--latency-image-size", "32"]
    command += ["--strategy", "pareto", "--n-trials", "3"]
    done, other = (
        subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
        for more in (["--finetune-steps", "1"], ["--checkpoint", "run/final.pt"])
    )
    assert done.returncode == 0, done.stderr
    values = complete(StudyOptions(str(tmp_path / "run/study.journal"), "tiny_k9"))
    assert len(values) == 3 and all(len(v) == 3 and 0 <= v[2] <= 100 for v in values.values())
    assert "| score |" in done.stdout
    # A study with scores is another one than without.
    assert other.returncode == 2 and "made with other options: finetune_steps 1, now 0" in other.stderr


HOLDER = """
from search.study import open_storage
import sys, time

storage = open_storage(sys.argv[1])
storage._backend._lock.acquire()
print("held", flush=True)
time.sleep(100)
"""


def test_the_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    from search.study import open_storage

    journal = str(tmp_path / "study.journal")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, journal], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    options = {"storage": open_storage(journal), "study_name": "found"}
    waiting = threading.Thread(target=optuna.create_study, kwargs=options)
    waiting.start()
    waiting.join(timeout=0.5)
    assert waiting.is_alive(), "the lock must hold while its process lives"
    holder.kill()
    waiting.join(timeout=60)
    assert optuna.get_all_study_names(open_storage(journal)) == ["found"]
    holder.wait()


def complete(options: StudyOptions) -> dict[int, Any]:
    from search.study import open_storage

    storage = open_storage(options.storage)
    if options.name not in optuna.get_all_study_names(storage):
        return {}
    trials = optuna.load_study(storage=storage, study_name=options.name).trials
    return {trial.number: trial.values for trial in trials if trial.state == TrialState.COMPLETE}
