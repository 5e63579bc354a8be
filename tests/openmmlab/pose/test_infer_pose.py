# SPDX-License-Identifier: Apache-2.0
"""What the command line says to mistakes; the way to skeletons is in test_training.py."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmpose")
from tests.openmmlab.commands import command

CONFIG = Path(__file__).parents[3] / "configs/human_pose/ic_res18_k9_drawn_256x256.py"


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (["none.jpg"], [], "no such picture: none.jpg"),
        (["a/1.jpg", "b/1.jpg"], [], "pictures must have different names"),
        (["a/1.jpg"], ["--config", "none.py"], "the config must be a file, got none.py"),
        (
            ["a/1.jpg"],
            ["--config", CONFIG],
            "no checkpoint in work_dirs/ic_res18_k9_drawn_256x256: train first",
        ),
        (["a/1.jpg"], ["--config", CONFIG, "--checkpoint", "none.pth"], "no checkpoint in none.pth"),
    ],
)
def test_mistakes_are_one_line(
    images: list[str],
    options: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    assert command("infer_pose")(*images, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "people").exists()
