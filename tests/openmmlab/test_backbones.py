# SPDX-License-Identifier: Apache-2.0
"""The backbones as OpenMMLab's configs build them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

pytest.importorskip("mmcv")

from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader

import ic_conv
import search
from ic_conv.checkpoint import pattern_of
from ic_conv.models import rednet
from ic_conv.models._rednet_keys import to_published
from ic_conv.openmmlab.backbones import CedNet, ICResNet, RedNet, SuperResNet
from search.supernet import convert_to_supernet
from tests.ic_conv.test_resnet import published, spread

ROOT = Path(__file__).parents[2]
R18 = "pattern_zoo/scattered_digits/ic_resnet18_k9.json"
R50 = "pattern_zoo/scattered_digits/ic_resnet50_k9.json"


def build(kind: str = "ICResNet", depth: int = 18, **options: Any) -> Any:
    """A backbone by its registered name."""
    torch.manual_seed(0)
    return MODELS.build({"type": kind, "depth": depth, **options})


def image(size: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def randomised(net: Any) -> Any:
    """In evaluation mode, with batch norms drawn anew, so that no block is the identity."""
    torch.manual_seed(2)
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 40, 40))
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


def loaded(checkpoint: Any, path: Path, prefix: str | None = None, **options: Any) -> Any:
    """A backbone initialised from a checkpoint, by way of a file."""
    torch.save(checkpoint, path)
    init_cfg = {"type": "Pretrained", "checkpoint": str(path)} | ({"prefix": prefix} if prefix else {})
    net = build(init_cfg=init_cfg, **options)
    net.init_weights()
    return net.eval()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: ICResNet(18), lambda: ic_conv.ic_resnet18()),
        (lambda: ICResNet(18, base_channels=8), lambda: ic_conv.ic_resnet18(width=8)),
        (lambda: ICResNet(18, R18), lambda: ic_conv.ic_resnet18(ROOT / R18)),
        (lambda: ICResNet(50, R50), lambda: ic_conv.ic_resnet50(ROOT / R50)),
        (lambda: ICResNet(101, groups=32, base_width=4), lambda: ic_conv.ic_resnext101_32x4d()),
        (lambda: RedNet(26), lambda: ic_conv.rednet26()),
        (lambda: RedNet(38, stem_kernel_size=3), lambda: ic_conv.rednet38(stem_kernel_size=3)),
        (lambda: CedNet(38), lambda: ic_conv.cednet38()),
        (
            lambda: CedNet(38, operator_cfg={"channel_reduction": None}),
            lambda: ic_conv.cednet38(channel_reduction=None),
        ),
        (lambda: SuperResNet(18, 5), lambda: convert_to_supernet(ic_conv.ic_resnet18(), 5)),
    ],
)
def test_backbones_are_the_models(ours: Any, theirs: Any) -> None:
    net, model = ours(), theirs()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state)
    model.out_indices = (0, 1, 2, 3)
    with torch.no_grad():
        outputs, expected = net.eval()(image(32, 1)), model.eval()(image(32, 1))
    assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))


def test_out_indices_are_the_stages() -> None:
    assert [tuple(x.shape) for x in build(out_indices=(1, 3))(image())] == [(2, 128, 8, 8), (2, 512, 2, 2)]


@pytest.mark.parametrize("with_cp", [False, True])
def test_the_last_stages_may_be_left_out(with_cp: bool) -> None:
    short, whole = build(num_stages=2, out_indices=(0, 1), with_cp=with_cp), build(out_indices=(0, 1))
    assert not hasattr(short, "layer3")
    short.load_state_dict({key: x for key, x in whole.state_dict().items() if key in short.state_dict()})
    assert all(torch.equal(x, y) for x, y in zip(short(image()), whole(image()), strict=True))
    with pytest.raises(ValueError, match="out_indices must be stages from 0 to 1; got"):
        build(num_stages=2)


@pytest.mark.parametrize("kind", ["ICResNet", "RedNet"])
@pytest.mark.parametrize("frozen", [-1, 0, 1, 4])
def test_frozen_stages_get_no_gradients_and_stay_in_eval(kind: str, frozen: int) -> None:
    net = build(kind, depth={"ICResNet": 18, "RedNet": 26}[kind], frozen_stages=frozen).train()
    stem = ("conv1", "bn1", "stem")
    for name, parameter in net.named_parameters():
        top = name.split(".")[0]
        stage = 0 if top in stem else int(top.removeprefix("layer"))
        assert parameter.requires_grad == (stage > frozen), name
    for stage in range(1, 5):
        assert net.get_submodule(f"layer{stage}").training == (stage > frozen)
    norms = [module for name, module in net.named_modules() if isinstance(module, _BatchNorm)]
    assert norms[0].training == (frozen < 0)


def test_norm_eval_keeps_only_batch_norms_in_eval() -> None:
    net = build("RedNet", 26, norm_eval=True).train()
    assert {module.training for module in net.modules() if isinstance(module, _BatchNorm)} == {False}
    assert net.layer1.training and net.layer1[0].conv1.training
    assert build("RedNet", 26).train().layer1[0].bn1.training


@pytest.mark.parametrize(
    ("norm_cfg", "kind"),
    [
        ({"type": "BN", "requires_grad": True, "momentum": 0.01}, nn.BatchNorm2d),
        ({"type": "SyncBN", "requires_grad": True}, nn.SyncBatchNorm),
        ({"type": "GN", "num_groups": 32, "requires_grad": False}, nn.GroupNorm),
    ],
)
def test_norm_cfg(norm_cfg: dict[str, Any], kind: type[nn.Module]) -> None:
    net = build("RedNet", 26, norm_cfg=norm_cfg)
    norms = [m for m in net.modules() if isinstance(m, (_BatchNorm, nn.GroupNorm))]
    assert len(norms) == 1 + 1 + 2 + 8 * 4 + 4 and all(isinstance(norm, kind) for norm in norms)
    assert {p.requires_grad for norm in norms for p in norm.parameters()} == {norm_cfg["requires_grad"]}
    assert getattr(norms[0], "momentum", 0.01) == norm_cfg.get(
        "momentum", 0.1 if kind is nn.SyncBatchNorm else 0.01
    )
    assert not net.layer1[0].bn3.weight.any(), "blocks must still start as the identity"
    if kind is not nn.SyncBatchNorm:
        assert all(x.isfinite().all() for x in net(image()))


def test_with_cp_changes_nothing_but_memory() -> None:
    plain, saving = (randomised(build("RedNet", 26, with_cp=with_cp)) for with_cp in (False, True))
    assert plain.state_dict().keys() == saving.state_dict().keys()
    held: list[int] = []
    for net in (plain, saving):
        held.append(0)

        def pack(x: Tensor) -> Tensor:
            held[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = net.train()(image())
        sum(x.square().mean() for x in out).backward()
    for (name, x), y in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, x), y in zip(plain.named_buffers(), saving.buffers(), strict=True):
        if "num_batches" not in name:
            torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")
    assert held[1] < held[0] / 3


def test_pretrained_from_plain_weights_puts_channels_in_the_patterns_order(tmp_path: Path) -> None:
    source = randomised(ic_conv.ic_resnet18())
    torchvisions = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    net = loaded(torchvisions, tmp_path / "plain.pth", pattern=R18)
    expected = ic_conv.ic_resnet18(ROOT / R18, weights=source.state_dict(), out_indices=(0, 1, 2, 3)).eval()
    for x, y in zip(net(image()), expected(image()), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("layout", ["own", "own in a detector", "published"])
def test_pretrained_from_weights_with_a_pattern(layout: str, tmp_path: Path) -> None:
    pattern = json.loads((ROOT / R18).read_text())
    source = randomised(build(pattern=pattern))
    state = source.state_dict()
    if layout == "published":
        state = published(state)
        assert any(".conv_list.1." in key for key in state)
    prefix = None
    if layout == "own in a detector":
        others = {key: torch.zeros_like(value) for key, value in state.items()}
        state = {"state_dict": prefixed(others, "teacher.backbone.") | prefixed(state, "student.backbone.")}
        prefix = "student.backbone."
    net = loaded(state, tmp_path / "pattern.pth", prefix, pattern=pattern)
    for x, y in zip(net(image()), source(image()), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("prefix", [None, "backbone.", "backbone"])
def test_pretrained_from_a_published_rednet(prefix: str | None, tmp_path: Path) -> None:
    source = randomised(rednet.rednet26(stem_kernel_size=3))
    checkpoint = {"meta": {"epoch": 1}, "state_dict": to_published(source.state_dict())}
    net = loaded(checkpoint, tmp_path / "red.pth", prefix, kind="RedNet", depth=26, stem_kernel_size=3)
    source.out_indices = (0, 1, 2, 3)
    for x, y in zip(net(image()), source(image()), strict=True):
        assert torch.equal(x, y)


def test_pretrained_from_a_checkpoint_of_the_runner(tmp_path: Path) -> None:
    hub = MessageHub.get_instance("backbones")
    hub.update_scalar("train/loss", 0.5)
    source = randomised(build())
    checkpoint = {"state_dict": prefixed(source.state_dict(), "backbone."), "message_hub": hub.state_dict()}
    net = loaded(checkpoint, tmp_path / "epoch_1.pth", "backbone.")
    assert all(torch.equal(x, y) for x, y in zip(net(image()), source(image()), strict=True))


def test_pretrained_batch_norm_weights_serve_group_norms(tmp_path: Path) -> None:
    source = randomised(ic_conv.ic_resnet18())
    groups = {"type": "GN", "num_groups": 32}
    net = loaded(source.state_dict(), tmp_path / "bn.pth", pattern=R18, norm_cfg=groups)
    assert torch.equal(net.bn1.weight, source.bn1.weight) and torch.equal(
        net.conv1.weight, source.conv1.weight
    )


@pytest.mark.parametrize("grown", [False, True])
def test_pretrained_supernet(grown: bool, tmp_path: Path) -> None:
    plain = randomised(ic_conv.ic_resnet18(out_indices=(0, 1, 2, 3)))
    source = convert_to_supernet(plain, 5, init="default" if grown else "inflate").eval()
    state = (source if grown else plain).state_dict()
    net = loaded(state, tmp_path / "super.pth", kind="SuperResNet", kernel_size=5)
    for x, y in zip(net(image()), source(image()), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("kind", ["RedNet", "CedNet"])
def test_pretrained_involutions_with_a_pattern(kind: str, plain: bool, tmp_path: Path) -> None:
    windows = {"depth": 26, "kernel_size": 5, "stem_kernel_size": 7}
    counts = [{"(0, 0)": groups - 1, "(1, 2)": 1} for groups in (4, 8, 8, 16, 16, 16, 16, 32)]
    source = randomised(build(kind, pattern=None if plain else counts, **windows))
    net = loaded(source.state_dict(), tmp_path / "red.pth", kind=kind, pattern=counts, **windows)
    expected = build(kind, pattern=counts, **windows)
    expected.load_state_dict(source.state_dict(), strict=not plain)
    assert all(torch.equal(x, y) for x, y in zip(net(image()), expected.eval()(image()), strict=True))
    assert sum(name.endswith("group_dilations") for name in net.state_dict()) == 8


def test_pretrained_from_an_address_goes_through_mmengine(monkeypatch: pytest.MonkeyPatch) -> None:
    source = randomised(ic_conv.ic_resnet18())
    asked = []

    def load(address: str, map_location: Any) -> dict[str, Tensor]:
        asked.append(address)
        return source.state_dict()

    monkeypatch.setattr(CheckpointLoader, "load_checkpoint", load)
    net = build(init_cfg={"type": "Pretrained", "checkpoint": "torchvision://resnet18"})
    net.init_weights()
    assert asked == ["torchvision://resnet18"] and torch.equal(net.conv1.weight, source.conv1.weight)


def test_supernet_backbone_gives_pattern_and_weights(tmp_path: Path) -> None:
    supernet = randomised(build("SuperResNet", kernel_size=5))
    pattern = search.edo(supernet, [image()])
    pattern.save(tmp_path / "found.json")
    net = loaded(supernet.state_dict(), tmp_path / "super.pth", pattern=tmp_path / "found.json")
    expected = ic_conv.apply_pattern(supernet, pattern)
    assert any(len(layer.branches) > 1 for layer in pattern.layers)
    for x, y in zip(net(image()), expected(image()), strict=True):
        torch.testing.assert_close(x, y)


def test_weights_once_trained_are_not_loaded_over(tmp_path: Path) -> None:
    net = loaded(build().state_dict(), tmp_path / "init.pth")
    nn.init.constant_(net.conv1.weight, 3.0)
    net.init_weights()
    assert (net.conv1.weight == 3.0).all()


def test_pattern_is_found_from_any_folder_or_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from_zoo = pattern_of(build(pattern=R18).state_dict())
    assert from_zoo and from_zoo.layers != pattern_of(build(pattern=plain_pattern()).state_dict()).layers  # type: ignore[union-attr]
    counts = json.loads((ROOT / R18).read_text())
    assert pattern_of(build(pattern=counts).state_dict()) == from_zoo
    (tmp_path / R18).parent.mkdir(parents=True)
    (tmp_path / R18).write_text(json.dumps(plain_pattern()))
    nearer = pattern_of(build(pattern=R18).state_dict())
    assert nearer == pattern_of(build(pattern=plain_pattern()).state_dict())


def plain_pattern() -> list[dict[str, int]]:
    return [{"(0, 0)": units} for units in (64,) * 4 + (128,) * 4 + (256,) * 4 + (512,) * 4]


def test_published_patterns_fit(shared_data: Path) -> None:
    file = shared_data / "official_patterns" / "detection_ic_resnet50_k9.json"
    assert len([m for m in build(depth=50, pattern=file).modules() if isinstance(m, ic_conv.ICConv2d)]) == 16


def test_resnext_pattern_counts_groups() -> None:
    options = {"depth": 50, "groups": 32, "base_width": 4}
    counts = [{"(0, 0)": 20, "(1, 2)": 12}] * 16
    assert build(pattern=counts, **options).layer1[0].conv2.pattern.counts == {(1, 1): 20, (2, 3): 12}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 51}, r"backbone\.depth: must be one of 18, 34, 50, 101, 152; got 51"),
        ({"kind": "RedNet"}, r"backbone\.depth: must be one of 26, 38, 50, 101, 152; got 18"),
        ({"pattern": R50}, r"backbone\.pattern: .*ic_resnet50_k9.*layer"),
        ({"pattern": "no/such.json"}, r"backbone\.pattern: no pattern file no/such\.json or .*no/such\.json"),
        ({"pattern": [{"(0, 0)": 64}]}, r"backbone\.pattern: the pattern has 1 layers, the network 16"),
        ({"pattern": [{"(0, -1)": 64}]}, r"backbone\.pattern: layer 0: a key must read"),
        ({"pattern": []}, r"backbone\.pattern: a pattern needs at least one layer"),
        ({"out_indices": (0, 4)}, "out_indices must be stages from 0 to 3"),
        ({"frozen_stages": 5}, r"backbone\.frozen_stages: must be one of -1, 0, 1, 2, 3, 4; got 5"),
        ({"style": "caffe"}, r"backbone\.style: must be one of pytorch; got 'caffe'"),
        (
            {"dilations": (1, 1, 2, 4)},
            r"backbone\.dilations: must be one of \(1, 1, 1, 1\); got \(1, 1, 2, 4\)",
        ),
        ({"deth": 50}, r"backbone\.deth: ICResNet has no such option"),
        (
            {"kind": "SuperResNet", "kernel_size": 8},
            r"backbone\.kernel_size: the kernel must be an odd number",
        ),
    ],
)
def test_wrong_options_name_their_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build(**options)


def test_inherited_options_are_accepted() -> None:
    build(num_stages=4, strides=[1, 2, 2, 2], dilations=(1, 1, 1, 1), style="pytorch")


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        (lambda: ic_conv.rednet26().state_dict(), {}, "size mismatch for layer1"),
        (lambda: build(depth=34).state_dict(), {}, "weights of another network: unknown"),
        (
            lambda: build(pattern=R18).state_dict(),
            {},
            r"belong to a dilation pattern; name it in backbone\.pattern",
        ),
        (lambda: build(pattern=R18).state_dict(), {"pattern": plain_pattern()}, "branches: must be"),
        (
            lambda: build().state_dict(),
            {"prefix": "backbone."},
            r"no key starts with the prefix 'backbone\.'",
        ),
        (
            lambda: ic_conv.rednet26(stem_kernel_size=3).state_dict(),
            {"kind": "RedNet", "depth": 26},
            "build it with stem_kernel_size=3",
        ),
        (
            lambda: {"state_dict": Path("a pickled object")},
            {},
            "can be read safely",
        ),
        (
            lambda: build("SuperResNet", kernel_size=5).state_dict(),
            {"pattern": plain_pattern()},
            "no layer to convert",
        ),
        (lambda: build("SuperResNet", kernel_size=5).state_dict(), {}, "size mismatch for layer1"),
        (lambda: [1, 2], {}, "must hold a dict of tensors"),
    ],
)
def test_wrong_weights_are_an_error_and_name_the_file(
    checkpoint: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^backbone\.init_cfg: .*wrong\.pth: .*{message}"):
        loaded(checkpoint(), tmp_path / "wrong.pth", **options)


def test_missing_weights_are_an_error() -> None:
    net = build(init_cfg={"type": "Pretrained", "checkpoint": "no/such.pth"})
    with pytest.raises(ValueError, match=r"^backbone\.init_cfg: .*no/such\.pth"):
        net.init_weights()


def test_spread_pattern_of_a_search_survives_a_reload(tmp_path: Path) -> None:
    pattern = spread(ic_conv.ic_resnet18(), assigned=True)
    pattern.save(tmp_path / "found.json")
    source = randomised(build(pattern=tmp_path / "found.json"))
    net = loaded(source.state_dict(), tmp_path / "w.pth", pattern=tmp_path / "found.json")
    assert all(torch.equal(x, y) for x, y in zip(net(image()), source(image()), strict=True))
