# SPDX-License-Identifier: Apache-2.0
"""What the search command passes on to the strategies, and refuses; studies that go on after a kill."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from ic_conv import DilationPattern
from search.command_line import build_options, parse_args
from search.latency import Kind, LatencyTable, Row
from search.storage import open_storage
from search.strategies import HistogramStrategy, ParetoStrategy
from search.strategy_arguments import TAKEN
from search.study import PRUNERS, SAMPLERS, StudyOptions

ROOT = Path(__file__).parents[2]
NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
"""
TINY = ["--arch", "mynet:tiny", "--kernel", "5", "--image-size", "32", "--calibration-images", "64"]
TINY += ["--steps", "2", "--work-dir", "run"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mynet.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    return tmp_path


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """`main` of tools/search.py, whose file name is that of the package."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("tools_search", ROOT / "tools/search.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "keep_freed_memory", lambda: None)  # would outlast the test
    return tool.main  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("histogram --search-steps 4 --n-trials 3 --storage none --pruner none", ["trial 3/3"]),
        ("darts --search-steps 4", ["search step 4/4"]),
        ("rfnext --search-steps 4 --updates 2", ["search step 4/4"]),
        ("single-path --search-steps 4 --n-trials 2", ["search step 4/4", "trial 2/2"]),
    ],
)
def test_strategies_that_train_show_their_steps_and_find_a_pattern(
    arguments: str,
    told: list[str],
    folder: Path,
    main: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*TINY, "--strategy", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in told), printed
    pattern = DilationPattern.load("run/tiny_k5.json")
    assert [(layer.name, layer.units) for layer in pattern.layers] == [("0", 8), ("2", 16)]
    assert pattern.meta["strategy"] == arguments.split()[0] and "plain_sha256" in pattern.meta
    assert pattern.meta["search_steps"] == 4


def strategy(arguments: str) -> Any:
    return build_options(parse_args([*TINY, "--strategy", *arguments.split()])).finder


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("darts", {"steps": 200, "progress": True}),
        ("darts --search-steps 7", {"steps": 7}),
        ("rfnext --search-steps 9 --updates 3", {"steps": 9, "updates": 3, "progress": True}),
        ("single-path --n-trials 6", {"steps": 200, "trials": 6, "progress": True}),
        ("gradient --moved-share 0.25 0.5", {"shares": (0.25, 0.5), "validation_steps": 0}),
        ("gradient --validation-steps 3", {"shares": (0.5,), "validation_steps": 3}),
        ("edo", {"criterion": "energy"}),
        ("edo --criterion mse", {"criterion": "mse"}),
        ("histogram", {"steps": 40, "latency": None, "progress": True}),
        ("histogram --search-steps 8", {"steps": 8}),
    ],
)
def test_arguments_become_the_strategy_s_own(arguments: str, wanted: dict[str, Any], folder: Path) -> None:
    found = strategy(arguments)
    assert found.name == arguments.split()[0]
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize("name", ["edo", "gradient"])
def test_limits_are_the_target_s_unless_given(name: str, folder: Path) -> None:
    limits = strategy(f"{name} --target cpu --max-branches 3").limits
    assert (limits.channel_multiple, limits.min_branch, limits.max_branches) == (16, 1, 3)


STUDY = "--storage s.log --study-name mine --sampler nsga2 --n-trials 7"


def test_studies(folder: Path) -> None:
    usual = StudyOptions("run/study.journal", "tiny_k5", "nsga2", trials=100)
    assert strategy("pareto").study_options == usual
    given = StudyOptions("s.log", "mine", "nsga2", trials=7)
    assert strategy(f"pareto {STUDY}").study_options == given
    usual = StudyOptions("run/study.journal", "tiny_k5_histogram", "tpe", pruner="median", trials=40)
    assert strategy("histogram").study == usual
    given = StudyOptions("s.log", "mine", "nsga2", pruner="halving", trials=7)
    assert strategy(f"histogram {STUDY} --pruner halving").study == given
    options = strategy("pareto --criterion mse --criteria taps refit --latency-image-size 64").options
    assert (options.yardstick, options.criteria, options.image_size) == ("mse", ["taps", "refit"], 64)


def test_the_latency_table_is_histogram_s_second_objective(folder: Path) -> None:
    kinds = {"0": Kind(3, 8, 1, 2, 16, 16), "2": Kind(8, 16, 1, 2, 8, 8)}
    rows = tuple(Row(kind, (((1, 1), kind.out_channels),), 1.0) for kind in kinds.values())
    LatencyTable("abacus", "tiny", 1, 1, 32, kinds, 1.0, rows).save("table.json")
    found = strategy("histogram --latency-table table.json --latency-device abacus")
    assert isinstance(found, HistogramStrategy) and found.latency is not None
    assert found.study.pruner == "none"
    table = strategy("pareto --latency-table table.json --latency-device abacus")
    assert isinstance(table, ParetoStrategy) and table.options.latency == found.latency
    with pytest.raises(ValueError, match=r"of this device, .*; it is of abacus"):
        strategy("histogram --latency-table table.json")
    with pytest.raises(ValueError, match="two need pruner none; got median"):
        strategy("histogram --latency-table table.json --latency-device abacus --pruner median")


def test_the_help_names_what_there_is() -> None:
    """The parser lists them by hand, since Optuna may be missing."""
    for option, known in (("--sampler", SAMPLERS), ("--pruner", PRUNERS)):
        for value in known:
            parse_args([option, value])
    parsed = vars(parse_args([]))
    assert all(parsed[option] is None for options in TAKEN.values() for option in options)


BAD = [
    ("edo --n-trials 100", "--n-trials is for the strategy pareto or histogram or single-path, got edo"),
    ("random --storage sqlite:///s.db", "--storage is for the strategy pareto or histogram, got random"),
    ("single-path --storage s.log", "--storage is for the strategy pareto or histogram, got single-path"),
    ("darts --updates 3", "--updates is for the strategy rfnext, got darts"),
    ("edo --search-steps 3", "is for the strategy histogram or rfnext or darts or single-path, got edo"),
    ("histogram --n-jobs 2", "--n-jobs is for the strategy pareto, got histogram"),
    ("pareto --pruner median", "--pruner is for the strategy histogram, got pareto"),
    ("edo --finetune-steps 2", "--finetune-steps is for the strategy pareto, got edo"),
    ("hand --channel-multiple 4", "--channel-multiple is for the strategy edo or gradient, got hand"),
    ("edo --moved-share 0.5", "--moved-share is for the strategy gradient, got edo"),
    ("random --criterion energy", "--criterion is for the strategy edo or pareto, got random"),
    ("histogram --search-steps 3", "a trial needs at least 4 steps, got 3"),
    ("histogram --n-trials 0", "trials must be at least 1, got 0"),
    ("rfnext --search-steps 3", "updates must lie between 1 and the steps, got 10 and 3"),
    ("darts --init crop", "the strategy darts has none; init can be refit"),
    ("histogram --storage no://x", "that can be reached: no://x"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_a_strategy_does_not_take_is_refused_in_one_line(
    arguments: str,
    message: str,
    folder: Path,
    main: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*TINY, "--strategy", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not list(folder.glob("run/*"))


def test_strategies_with_studies_say_that_they_need_optuna(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "search.study", None)
    for name in ("pareto", "histogram", "single-path"):
        with pytest.raises(ValueError, match=f"--strategy {name} needs Optuna, pip install"):
            strategy(name)


def test_torch_is_imported_after_openmp_s_settings_alone() -> None:
    code = (
        "import runpy, sys; runpy.run_path('tools/search.py'); import os; "
        "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'], sys.path[0] == os.getcwd())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False PASSIVE True\n"


def trials_of(journal: Path) -> list[FrozenTrial]:
    storage = open_storage(str(journal))
    studies = storage.get_all_studies()
    return storage.get_all_trials(studies[0]._study_id) if studies else []


@pytest.mark.slow
def test_a_killed_histogram_goes_on_and_finds_what_it_would_have_found(
    folder: Path, main: Callable[[list[str]], int]
) -> None:
    arguments = [*TINY, "--resume", "--strategy", "histogram", "--n-trials", "8", "--search-steps", "40"]
    command = [sys.executable, str(ROOT / "tools/search.py"), *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    journal, deadline = folder / "run/study.journal", time.monotonic() + 100
    trials: list[FrozenTrial] = []
    while len(trials) < 4 or "owner" not in trials[-1].user_attrs or trials[-1].state.is_finished():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
        trials = trials_of(journal) if journal.exists() else []
    process.kill()
    process.wait()
    assert [main([*arguments, "--work-dir", work_dir]) for work_dir in ("run", "whole")] == [0, 0]
    killed, whole = (trials_of(folder / work_dir / "study.journal") for work_dir in ("run", "whole"))
    made = [(trial.params, trial.values) for trial in killed if trial.state != TrialState.FAIL]
    assert len(killed) == 9 and made == [(trial.params, trial.values) for trial in whole]
    for name in ("tiny_k5.json", "tiny_k5.meta.json"):
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()
