# SPDX-License-Identifier: Apache-2.0
"""The search command's warm starts, and its search without a supernet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from ic_conv import DilationPattern, apply_pattern, ic_resnet18
from ic_conv.checkpoint import read_weights
from search import SearchTask, convert_to_supernet
from search.refit import warm_start
from search.strategies import RandomStrategy
from search.supernet import open_candidates, super_layers

ROOT = Path(__file__).parents[2]

# A network of the user's own, in a module that only the working folder knows.
MODULE = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
                         nn.Conv2d(16, 16, 3, 1, 1, groups=4))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mynet.py").write_text(MODULE)
    return tmp_path


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "search.py"), "--arch", "mynet:tiny", *map(str, arguments)]


def search(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = command("--steps", 3, "--calibration-images", 32, "--workers", 0, "--work-dir", "run", *arguments)
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def tiny(folder: Path) -> nn.Module:
    scope: dict[str, Any] = {}
    exec((folder / "mynet.py").read_text(), scope)
    return scope["tiny"]()  # type: ignore[no-any-return]


def test_refit_writes_weights_that_the_network_with_the_pattern_takes(folder: Path) -> None:
    done = search(folder, "--init", "refit", "--criterion", "refit")
    assert done.returncode == 0, done.stderr
    pattern = DilationPattern.load(folder / "run/tiny_k9.json")
    assert pattern.meta["init"] == "refit" and pattern.meta["criterion"] == "refit"
    assert "weights  run/tiny_k9.pt" in done.stdout
    network = apply_pattern(tiny(folder), pattern)
    network.load_state_dict(read_weights(folder / "run/tiny_k9.pt")[0])
    again = search(folder, "--init", "crop", "--checkpoint", "run/final.pt", "--output", "crop/p.json")
    assert again.returncode == 0, again.stderr
    refitted, cropped = (read_weights(folder / name)[0] for name in ("run/tiny_k9.pt", "crop/p.pt"))
    assert any(not torch.equal(refitted[name], cropped[name]) for name in cropped if name in refitted)


def test_several_searches_narrow_the_supernet(folder: Path) -> None:
    done = search(folder, "--searches", 2, "--init", "refit")
    assert done.returncode == 0, done.stderr
    assert "searches: 2, evenly spread" in done.stdout
    assert DilationPattern.load(folder / "run/tiny_k9.json").meta["training"]["searches"] == 2
    weights = read_weights(folder / "run/final.pt")[0]
    supernet = convert_to_supernet(tiny(folder), 9)
    supernet.load_state_dict(
        {name.removeprefix("network."): weights[name] for name in weights if "network" in name}
    )
    for layer in super_layers(supernet).values():
        assert (open_candidates(layer).sum(1) == 4).all()
    again = search(folder, "--checkpoint", "run/final.pt", "--output", "again/p.json")
    assert again.returncode == 0, again.stderr
    first, second = (DilationPattern.load(folder / name) for name in ("run/tiny_k9.json", "again/p.json"))
    assert first.layers == second.layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--searches", 0], "searches must be at least 1, got 0"),
        (["--searches", 4], "each search needs a training step before it: 4 searches, 3 steps"),
        (["--searches", 2, "--strategy", "random"], "got 2 with the strategy random"),
        (["--searches", 2, "--checkpoint", "mynet.py"], "got 2 with a checkpoint"),
    ],
)
def test_searches_that_cannot_be_are_one_line(arguments: list[Any], message: str, folder: Path) -> None:
    done = search(folder, *arguments)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].endswith(message)


def test_a_resumed_training_keeps_its_searches(folder: Path) -> None:
    assert search(folder, "--searches", 2).returncode == 0
    done = search(folder, "--searches", 3, "--resume")
    assert (
        done.returncode == 2 and "hooks was ['searches after 1'], got ['searches after 1, 2']" in done.stderr
    )


def test_a_strategy_without_supernet_trains_one_for_the_weights(folder: Path) -> None:
    done = search(folder, "--strategy", "random", "--init", "refit")
    assert done.returncode == 0 and "step 3/3" in done.stdout, done.stderr
    assert (folder / "run/tiny_k9.pt").exists()
    assert "supernet_sha256" in DilationPattern.load(folder / "run/tiny_k9.json").meta


@pytest.mark.parametrize("criterion", ["energy", "refit"])
def test_two_processes_write_what_one_writes(criterion: str, folder: Path) -> None:
    assert search(folder).returncode == 0
    options = ["--calibration-images", "48", "--checkpoint", "run/final.pt"]
    options += ["--criterion", criterion, "--init", "refit"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [*command(*options, "--output", "one/p.json")]
    two = [*torchrun, *command(*options, "--output", "two/p.json", "--launcher", "pytorch")[1:]]
    for line in (one, two):
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for name in ("p.json", "p.meta.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    states = [read_weights(folder / run / "p.pt")[0] for run in ("one", "two")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_gradient_starts_from_a_plain_network(folder: Path) -> None:
    done = search(folder, "--strategy", "gradient", "--moved-share", "0.25", "--init", "refit")
    assert done.returncode == 0 and "step 3/3" in done.stdout, done.stderr
    pattern = DilationPattern.load(folder / "run/tiny_k9.json")
    assert [layer.plain_share for layer in pattern.layers] == [0.75] * 3
    assert pattern.meta["moved_shares"] == [0.25, 0.25] and "plain_sha256" in pattern.meta
    network = apply_pattern(tiny(folder), pattern)
    network.load_state_dict(read_weights(folder / "run/tiny_k9.pt")[0])
    done = search(folder, "--strategy", "gradient", "--checkpoint", "run/final.pt", "--output", "b/p.json",
                  "--validation-steps", 1)  # fmt: skip
    assert done.returncode == 0 and "step" not in done.stdout, done.stderr
    assert len(DilationPattern.load(folder / "b/p.json").meta["validation_loss"]) >= 4


def test_constant_images_and_too_few_are_told_in_a_line_each(folder: Path) -> None:
    for kind in range(2):
        (folder / f"grey/{kind}").mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (96, 96), (90, 90, 90)).save(folder / f"grey/{kind}/{index}.png")
    torch.save(convert_to_supernet(tiny(folder), 9).state_dict(), folder / "supernet.pt")
    options = ["--data", "grey", "--image-size", "16", "--batch-size", "1", "--calibration-images", "1"]
    done = search(folder, *options, "--checkpoint", "supernet.pt", "--init", "refit")
    assert done.returncode == 0, done.stderr
    few, constant = done.stderr.strip().splitlines()
    assert "output positions are few for" in few
    assert "in 0 3 of 3): a fit learns nothing from them" in constant
    assert all(value.isfinite().all() for value in read_weights(folder / "run/tiny_k9.pt")[0].values())


@pytest.mark.parametrize(("init", "width"), [("crop", 64), ("refit", 8)])
def test_backbones_take_the_weights(init: Any, width: int, tmp_path: Path, caplog: Any) -> None:
    torch.manual_seed(0)
    supernet = convert_to_supernet(ic_resnet18(width=width, out_indices=(0, 1, 2, 3)), 5)
    pattern = RandomStrategy().search(SearchTask.of(supernet))
    images = torch.randn(8, 3, 64, 64)
    network = warm_start(supernet, pattern, lambda: [images], init=init).eval()
    path, file = tmp_path / "p.json", tmp_path / "p.pt"
    pattern.save(path)
    torch.save({"state_dict": network.state_dict()}, file)
    nets: list[nn.Module] = [ic_resnet18(path, weights=file, width=width, out_indices=(0, 1, 2, 3))]
    if width == 64:
        backbones = pytest.importorskip("ic_conv.openmmlab.backbones")
        init_cfg = {"type": "Pretrained", "checkpoint": str(file)}
        nets.append(backbones.ICResNet(depth=18, pattern=str(path), init_cfg=init_cfg))
        nets[-1].init_weights()  # type: ignore[operator]
    for net in nets:
        with torch.no_grad():
            for found, expected in zip(net.eval()(images), network(images), strict=True):
                torch.testing.assert_close(found, expected)
    classifier = ic_resnet18(path, weights=file, width=width)
    assert classifier(images).shape == (8, 1000) and "holds no classifier" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--init", "best"), "init must be one of scratch, crop, refit; got 'best'"),
        (("--strategy", "gradient", "--init", "crop"), "the strategy gradient has none"),
        (("--moved-share", "0.3"), "--moved-share is for the strategy gradient, got edo"),
        (("--strategy", "gradient", "--moved-share", "2"), "must lie between 0 and 1, got [2.0]"),
        (("--strategy", "gradient", "--checkpoint", "bare.pt"), "bare.pt holds a network without the head"),
        (("--checkpoint", "bare.pt"), "must fit the network, bare.pt: 0.weight is (8, 3, 3, 3) in the file"),
        (
            ("--checkpoint", "k5.pt"),
            "k5.pt: 0.weight is (8, 3, 5, 5) in the file, (8, 3, 9, 9) in",
        ),
    ],
)
def test_bad_requests_end_with_one_line(options: tuple[str, ...], message: str, folder: Path) -> None:
    torch.save(tiny(folder).state_dict(), folder / "bare.pt")
    torch.save(convert_to_supernet(tiny(folder), 5).state_dict(), folder / "k5.pt")
    done = search(folder, *options)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
