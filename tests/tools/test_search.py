# SPDX-License-Identifier: Apache-2.0
"""The search command from the user's side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ic_conv import DilationPattern, apply_pattern
from search import convert_to_supernet
from search.tasks import wrap

ROOT = Path(__file__).parents[2]

# A network of the user's own, in a module that only the working folder knows.
MODULE = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
                         nn.Conv2d(16, 16, 3, 1, 1, groups=4))

def logits():
    return nn.Sequential(*tiny(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))

def linear():
    return nn.Sequential(nn.Conv2d(3, 10, 1), nn.ReLU())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mynet.py").write_text(MODULE)
    return tmp_path


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "search.py"), *map(str, arguments)]


def search(folder: Path, *arguments: object, arch: str = "mynet:tiny") -> subprocess.CompletedProcess[str]:
    options = ["--arch", arch, "--steps", 3, "--calibration-images", 32, "--workers", 0, "--work-dir", "run"]
    return subprocess.run(
        command(*options, *arguments), cwd=folder, capture_output=True, text=True, check=False
    )


def tiny(folder: Path) -> nn.Module:
    scope: dict[str, object] = {}
    exec(MODULE, scope)
    return scope["tiny"]()  # type: ignore[operator,no-any-return]


def test_the_main_job_ends_with_pattern_meta_picture_table_and_next_command(folder: Path) -> None:
    done = search(folder)
    assert done.returncode == 0, done.stderr
    pattern = DilationPattern.load(folder / "run/tiny_k9.json")
    assert [(layer.name, layer.units) for layer in pattern.layers] == [("0", 8), ("2", 16), ("4", 4)]
    assert pattern.meta["architecture"] == "mynet:tiny" and pattern.meta["criterion"] == "energy"
    assert (
        pattern.meta["training"] == {"steps": 3, "batch_size": 8}
        and len(pattern.meta["supernet_sha256"]) == 64
    )
    with Image.open(folder / "run/tiny_k9.png") as picture:
        assert min(picture.size) > 300 and len(set(picture.convert("L").getdata())) > 50
    assert "= network" in done.stdout and "step 3/3" in done.stdout
    following = done.stdout.strip().splitlines()[-1].strip()
    again = subprocess.run(
        following,
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
        },
    )
    assert "ICConv2d" in again.stdout, again.stderr


def test_a_checkpoint_replaces_the_training_and_gives_the_same_pattern(folder: Path) -> None:
    assert search(folder).returncode == 0
    done = search(folder, "--checkpoint", "run/final.pt", "--output", "again/p.json")
    assert done.returncode == 0 and "step" not in done.stdout
    assert (folder / "again/p.json").read_bytes() == (folder / "run/tiny_k9.json").read_bytes()
    state = torch.load(folder / "run/final.pt", weights_only=True)["state_dict"]
    bare = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
    torch.save(bare, folder / "bare.pt")  # a training loop of the user's own would save this
    done = search(folder, "--checkpoint", "bare.pt", "--output", "bare/p.json")
    assert done.returncode == 0, done.stderr
    assert (folder / "bare/p.json").read_bytes() == (folder / "run/tiny_k9.json").read_bytes()
    supernet = convert_to_supernet(tiny(folder), 9)
    supernet.load_state_dict(bare)
    cropped = apply_pattern(supernet, DilationPattern.load(folder / "run/tiny_k9.json"))
    assert wrap(cropped, 10)(torch.zeros(1, 3, 64, 64)).shape == (1, 10, 16, 16)


@pytest.mark.parametrize("strategy", ["random", "uniform", "hand"])
def test_strategies_without_supernet_train_nothing(strategy: str, folder: Path) -> None:
    done = search(folder, "--strategy", strategy)
    assert done.returncode == 0 and "step" not in done.stdout, done.stderr
    assert "supernet_sha256" not in DilationPattern.load(folder / "run/tiny_k9.json").meta


def test_own_images_and_logits(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog", "emu"):
        (folder / "photos" / kind).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / kind / f"{index}.png")
    done = search(folder, "--data", "photos", "--epochs", "1", arch="mynet:logits")
    assert done.returncode == 2 and "not allowed with argument" in done.stderr  # --steps and --epochs
    done = search(folder, "--data", "photos", arch="mynet:logits")
    assert done.returncode == 0 and "Classification, 3 classes" in done.stdout, done.stderr
    (folder / "photos/cat/0.png").write_bytes(b"no image")
    done = search(folder, "--data", "photos", arch="mynet:logits")
    assert done.returncode == 2 and "photos/cat/0.png" in done.stderr
    done = search(folder, "--data", "photos", "--skip-bad", "--work-dir", "second", arch="mynet:logits")
    assert done.returncode == 0 and "photos/cat/0.png" in done.stderr


def test_dry_run_plans_and_writes_nothing(folder: Path) -> None:
    done = search(folder, "--dry-run", "--kernel", 13)
    assert done.returncode == 0, done.stderr
    for part in (
        "3 layers grow from 3x3 to 13x13; 36 dilations",
        "4 groups",
        "GiB",
        "s per step",
        "tiny_k13.json",
    ):
        assert part in done.stdout
    assert not list(folder.glob("run/*"))


def test_help_teaches() -> None:
    done = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
    for part in ("examples:", "--kernel", "energy", "random", "ic_resnet50", ".meta.json"):
        assert part in done.stdout


BAD = [
    (["--kernel", 8], "the kernel must be an odd number of at least 3, got 8"),
    (["--kernel", 3], "must be larger than the base kernel"),
    (["--base-kernel", 5], "no searchable layer: the network has no 5x5 convolution"),
    (["--arch", "mynet:linear"], "no searchable layer"),
    (["--arch", "nothing"], "unknown arch 'nothing'; give package.module:factory, or one of ic_resnet18"),
    (["--arch", "mynet:none"], "cannot import the arch 'mynet:none'"),
    (["--strategy", "magic"], "unknown strategy 'magic'; known ones: edo, random, uniform, hand"),
    (["--criterion", "magic"], "unknown criterion 'magic'; known ones: energy"),
    (["--data", "empty"], "empty"),
    (["--data", "missing"], "missing"),
    (["--checkpoint", "missing.pt"], "the checkpoint must exist, got missing.pt"),
    (
        ["--checkpoint", "other.pt"],
        "other.pt: 0.weight is (8, 3, 5, 5) in the file, (8, 3, 9, 9) in the network",
    ),
    (["--checkpoint", "mynet.py"], "mynet.py: not a file of weights that can be read safely"),
    (["--output", "mynet.py/p.json"], "the output folder must be writable: mynet.py"),
    (["--output", "p.txt"], "must end in .json"),
    (["--steps", 0], "steps must be at least 1, got 0"),
    (["--launcher", "pytorch"], "needs torchrun"),
    (["--device", "cuda:99"], "got device 'cuda:99'"),
    (["--config", "missing.py"], "the config file must exist, got missing.py"),
    (["--target", "cpu"], "0: the channel multiple must be at most its 8 channels, got 16"),
    (["--max-branches", 0], "max branches must be at least 1, got 0"),
    (
        ["--strategy", "pareto", "--storage", "postgresql+psycopg://me:secret@localhost:1/studies"],
        "postgresql:// that can be reached: postgresql+psycopg://localhost:1/studies",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    BAD,
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(
    arguments: list[object],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "empty").mkdir()
    torch.save(convert_to_supernet(tiny(folder), 5).state_dict(), folder / "other.pt")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    main = load_tool()
    defaults = ["--arch", "mynet:tiny", "--steps", "1", "--work-dir", "run"]
    assert main([*defaults, *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not list(folder.glob("run/*.json"))


def load_tool():  # type: ignore[no-untyped-def]
    """`main` of tools/search.py, whose file name is that of the package."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("tools_search", ROOT / "tools/search.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(tool)
    sys.path[:] = before
    return tool.main


def test_ctrl_c_keeps_the_state_and_prints_the_command_that_goes_on(folder: Path) -> None:
    arguments = [
        "--arch",
        "mynet:tiny",
        "--steps",
        60,
        "--workers",
        0,
        "--work-dir",
        "run",
        "--calibration-images",
        16,
    ]
    process = subprocess.Popen(
        command(*arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in error, error
    assert (folder / "run/state.pt").exists() and not (folder / "run/final.pt").exists()
    following = error.strip().splitlines()[-1]
    assert following.endswith("--resume")

    refused = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr, (
        "an unfinished training is not overwritten"
    )
    going_on = subprocess.run(
        command(*arguments, "--resume"), cwd=folder, capture_output=True, text=True, check=False
    )
    assert going_on.returncode == 0, going_on.stderr
    start = time.monotonic()
    finished = subprocess.run(
        command(*arguments, "--resume"), cwd=folder, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0 and "step" not in finished.stdout and time.monotonic() - start < 60

    subprocess.run(command(*arguments, "--work-dir", "whole"), cwd=folder, capture_output=True, check=True)
    names = ("tiny_k9.json", "tiny_k9.meta.json")
    assert all((folder / "whole" / n).read_bytes() == (folder / "run" / n).read_bytes() for n in names)
    meta = json.loads((folder / "run/tiny_k9.meta.json").read_text())
    assert meta["provenance"]["training"]["steps"] == 60
