# SPDX-License-Identifier: Apache-2.0
"""What is shown of long work: a bar on a terminal, lines elsewhere, or nothing."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from search import progress

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: Any) -> list[str]:
    return capsys.readouterr().out.splitlines()  # type: ignore[no-any-return]


def test_a_line_every_ten_seconds_and_at_the_end(clock: list[float], capsys: Any) -> None:
    with progress.bar("trial", 100) as report:
        for done in range(1, 11):
            clock[0] += 4
            report(done)
        assert lines(capsys) == [f"trial {n}/100  ETA 00:{m}:{s}" for n, m, s in
                                 ((1, "06", 36), (4, "06", 24), (7, "06", 12), (10, "06", "00"))]  # fmt: skip
        report(120)  # processes that end together make more
        report(121)
        assert lines(capsys) == ["trial 100/100  ETA 00:00:00"]


def test_work_that_goes_on_is_not_taken_for_fast(clock: list[float], capsys: Any) -> None:
    with progress.bar("trial", 100, done=90) as report:
        clock[0] += 10
        report(91)
    assert lines(capsys) == ["trial 91/100  ETA 00:01:30"]


def test_nothing_is_shown_unless_wanted(capsys: Any) -> None:
    with progress.bar("trial", 2, shown=False) as report:
        report(1)
        report(2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_a_terminal_has_a_bar_of_the_first_process(rank: str, shown: bool) -> None:
    code = f"""
from unittest.mock import patch
from search import progress
with patch.object(progress, "is_main_process", lambda: {rank} == 0):
    with progress.bar("trial", 7, done=2) as report:
        report(3)
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=theirs, env=environment)
    os.close(theirs)
    found = b""
    try:
        while part := os.read(ours, 4096):
            found += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    assert (b"2/7" in found and b"3/7" in found and b"\x1b[" in found) == shown and (shown or not found)
