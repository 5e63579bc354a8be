# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = {"mAP_small": 1.0, "mAP_medium": 2.0, "mAP_large": 3.0, "plain_share": 1.0}


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return runpy.run_path(str(ROOT / "tools/compare.py"))["main"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "plain,magic"], "unknown method 'magic'; known ones: supernet, plain"),
        (["--methods", "plain", "--against", "hand"], "hand must be among the methods"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_one_line(
    arguments: list[str], words: str, main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["digits", "--work-dir", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


@pytest.mark.slow
def test_finished_runs_are_only_shown(main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"steps": 600, "batch_size": 32, "kernel": 9, "val_images": 1000}
    for seed in (0, 1):
        for name, score in (("plain", 80.0), ("plain_x2_steps", 83.0 + seed)):
            path = tmp_path / f"seed{seed}/{name}.result.json"
            path.parent.mkdir(exist_ok=True)
            result = {**FIGURES, "mAP": score}
            path.write_text(json.dumps({"options": options, "result": result, "seconds": 7.0}))
    arguments = ["--methods", "plain,plain x2 steps", "--seeds", "2", "--jobs", "1", "--against", "plain"]
    files = ["--output", str(tmp_path / "t.md"), "--figure", str(tmp_path / "f.svg")]
    assert main(["digits", "--work-dir", str(tmp_path), *arguments, *files]) == 0
    row = (tmp_path / "t.md").read_text().splitlines()[3]
    assert row in capsys.readouterr().out and row.startswith("| plain x2 steps | 83.5 ± 6.4 |")
    assert "| +3.5 ± 6.4 |" in row and row.endswith("| 2.00 | 1.00 | 2 |")
    assert (tmp_path / "f.svg").exists()
