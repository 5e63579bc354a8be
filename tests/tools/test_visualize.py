# SPDX-License-Identifier: Apache-2.0
"""Pictures: the numbers behind them, and the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ic_conv.models import RedNet, rednet26
from ic_conv.visualize import draw_kernel_maps, kernel_maps, last_of_each_stage, read_image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def net() -> RedNet:
    torch.manual_seed(0)
    return RedNet((2, 1, 1, 1), width=16, group_channels=4, kernel_size=3, num_classes=2)


@pytest.fixture(scope="module")
def photo(shared_data: Path) -> Path:
    return shared_data / "coco_mini" / "000000000785.jpg"


def visualize(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "visualize.py"), "involution", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_maps_are_sums_of_the_generated_kernels(net: RedNet) -> None:
    """With zero weights the kernels are the bias of conv2, whatever the image shows."""
    layer = net.get_submodule("layer2.0.conv2")
    nn.init.zeros_(layer.get_parameter("conv2.conv.weight"))
    bias = layer.get_parameter("conv2.conv.bias")
    nn.init.normal_(bias)
    net.train()
    maps = kernel_maps(net, np.zeros((40, 33, 3), np.uint8), ["layer2.0.conv2"])["layer2.0.conv2"]
    assert maps.shape == (8, 5, 5)
    torch.testing.assert_close(maps, bias.detach().view(8, 9).sum(1)[:, None, None].expand(8, 5, 5))
    assert net.training and not any(module._forward_pre_hooks for module in net.modules())


def test_image_is_normalised_as_in_training(net: RedNet) -> None:
    seen = []
    hook = net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    kernel_maps(net, np.full((32, 32, 3), 255, np.uint8), ["stem.1"])
    hook.remove()
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.64]), rtol=0, atol=1e-3)


def test_default_layers(net: RedNet) -> None:
    assert last_of_each_stage(net) == ["layer1.1.conv2", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]


def test_unknown_layer(net: RedNet) -> None:
    with pytest.raises(ValueError, match=r"the involutions stem.1, layer1.0.conv2, .*; got 'layer1'"):
        kernel_maps(net, np.zeros((32, 32, 3), np.uint8), ["layer1"])


def test_bright_is_where_kernels_sum_high(tmp_path: Path) -> None:
    """Two maps of one layer, bright on the left and bright on the right half, beside a grey image."""
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    image = np.full((80, 80, 3), 128, np.uint8)
    draw_kernel_maps(image, {"layer": torch.stack([left, 1 - left])}, tmp_path / "maps.png", "title")
    pixels = np.asarray(Image.open(tmp_path / "maps.png").convert("L")).astype(float)
    middle = pixels[int(len(pixels) * 0.6)]
    first, second = (middle[int(len(middle) * part) :][:60] for part in (0.37, 0.70))
    assert first.mean() > 150 and second.mean() < 50


def test_image_is_scaled_by_its_short_side(tmp_path: Path) -> None:
    Image.new("L", (60, 40)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png", 20).shape == (20, 30, 3)


def test_command(photo: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = rednet26(num_classes=3, stem_kernel_size=3).state_dict()
    torch.save(weights, tmp_path / "red26.pth")
    arguments = ["--image", photo, "--arch", "rednet26", "--image-size", 96, "--groups", 2]
    arguments += ["--layers", "stem.1", "layer4.0.conv2", "--output", tmp_path / "maps.png"]
    done = visualize(*arguments, "--checkpoint", tmp_path / "red26.pth", "--stem-kernel-size", 3)
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", str(tmp_path / "maps.png"))
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.width > picture.height > 300
    done = visualize(*arguments, "--checkpoint", tmp_path / "red26.pth")
    assert done.returncode == 2
    assert "stem_kernel_size=3" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = visualize(*arguments)
    assert done.returncode == 0
    assert "the weights are random" in done.stderr


def test_mistake_is_one_line() -> None:
    done = visualize("--image", "missing.jpg", "--output", "maps.png")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: [Errno 2] No such file or directory: 'missing.jpg'"]


def test_bad_images(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot identify image file"):
        read_image(__file__, 32)
    with pytest.raises(ValueError, match="the image size must be at least 1, got 0"):
        read_image(tmp_path / "image.png", 0)


def test_bad_picture(tmp_path: Path) -> None:
    image, maps = np.zeros((8, 8, 3), np.uint8), {"layer": torch.rand(2, 4, 4)}
    with pytest.raises(ValueError, match="at least 1 group must be drawn, got 0"):
        draw_kernel_maps(image, maps, tmp_path / "maps.png", "title", groups=0)
    with pytest.raises(ValueError, match="'doc' is not supported"):
        draw_kernel_maps(image, maps, tmp_path / "maps.doc", "title")
    assert list(tmp_path.iterdir()) == []
